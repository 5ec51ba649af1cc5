"""First values by the part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CASES, Bags

import embtab as et
from embtab.errors import UserError
from embtab.lookup.init import Draw
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


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tensors that were drawn."""
    shapes = []
    normal_ = torch.Tensor.normal_

    def counted(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return normal_(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    return shapes


@pytest.mark.parametrize("method", ["unified", "robe", "multihash", "memcom", "dense"])
def test_each_table_is_drawn_once_however_many_features_share_it(method, draws):
    plan = et.plan([et.Feature(f"f{i}", 500) for i in range(30)], method, "0.3x" if method != "dense" else None)
    et.EmbeddingBagCollection(plan, backend="torch")
    assert sorted(draws) == sorted((table.num_rows, table.width) for table in plan.tables.values())


def test_what_is_overwritten_is_not_drawn(tmp_path, draws):
    plan = et.plan([et.Feature("user", 500), et.Feature("item", 500)], {"user": "unified", "*": "dhe"}, "0.3x")
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    et.save(tables, tmp_path / "bundle")
    draws.clear()
    loaded = et.load(tmp_path / "bundle", "fbgemm")
    assert draws == []
    for part in ("lookup", "arrays"):
        found, expected = (getattr(each, part).state_dict() for each in (loaded, tables))
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("method", ["cce", "cafe", "freqcut"])
def test_undrawn_tables_are_zero_and_have_the_integer_arrays_of_drawn_ones(method):
    plan = et.plan([et.Feature("user", 500), et.Feature("item", 900)], method, "0.5x")
    empty, drawn = (et.EmbeddingBagCollection(plan, init_std=std).state_dict() for std in (None, 1.0))
    for name, value in empty.items():
        if name.startswith("lookup.") or value.is_floating_point():
            assert not value.any(), name
        else:
            assert torch.equal(value, drawn[name]), name
