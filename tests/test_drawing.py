"""First values by the part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CASES, Bags

import embtab as et
from embtab.drawing import Draw
from embtab.errors import UserError
from embtab.methods import Table
from embtab.methods.base import PartInit

ROWS = 2_500  # two blocks and a half


def draw(seed: int = 3, num_rows: int = ROWS) -> Draw:
    tables = {"a": Table("a", num_rows, 6), "b": Table("b", num_rows, 6)}
    return Draw(tables, {"a": PartInit(0.0, 0.3), "b": PartInit(1.0, 0.1)}, seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, ROWS), st.integers(0, ROWS))
def test_any_part_is_a_part_of_the_whole(first, stop):
    whole = draw().rows("b", 0, ROWS)
    assert torch.equal(draw().rows("b", first, max(first, stop)), whole[first : max(first, stop)])


def test_blocks_tables_and_seeds_differ():
    a, b = draw().rows("a", 0, ROWS), draw().rows("b", 0, ROWS)
    assert a.mean() == pytest.approx(0, abs=0.01)
    assert a.std() == pytest.approx(0.3, rel=0.02)
    assert b.mean() == pytest.approx(1, abs=0.01)
    standard = [a[:1024] / 0.3, a[1024:2048] / 0.3, (b[:1024] - 1) / 0.1, draw(4).rows("a", 0, 1024) / 0.3]
    for i, one in enumerate(standard):
        for other in standard[:i]:
            assert abs((one * other).mean()) < 0.06  # 6,144 products of standard deviation 1: five sigma


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_seed_makes_collections_equal(case):
    tables = [et.EmbeddingBagCollection(case.plan()) for _ in range(2)]
    for each in tables:
        each.init(0.3, seed=5)
    first, second = (each.state_dict() for each in tables)
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_tables_on_the_meta_device_take_no_memory_and_say_what_to_do():
    features = [et.Feature("user", 10**9)]  # 64 GB
    tables = et.EmbeddingBagCollection(et.plan(features, "dense", dim=16), device="meta")
    assert [key for key in tables.state_dict() if key.startswith("lookup.")] == []
    with pytest.raises(UserError, match="hold no rows; give the Trainer strategy"):
        tables(Bags({"user": [[(3, 1.0)]]}).kjt(weighted=False))
