"""Shapes: the smallest form is the smallest, gives exactly the masked vectors, and keeps the budget."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import single_ids

import embtab as et
from embtab.features import id_spaces
from embtab.learned.forms import compacted, largest_within, nbytes_of, plan_of, smallest
from embtab.methods import Spec
from embtab.methods.bitmap import bitmap, locate, popcount

FEATURES = [et.Feature("a", 7), et.Feature("b", 300), et.Feature("seen", 90, pooling="mean", id_space="item")]


def drawn(seed: int, rows: float, entries: float, dim: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        s.name: (random.random((s.num_ids, dim)) < entries) & (random.random((s.num_ids, 1)) < rows)
        for s in id_spaces(FEATURES)
    }


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_popcount_counts_bits_in_torch_and_numpy(values: list[int]) -> None:
    expected = [bin(value % 2**64).count("1") for value in values]
    assert popcount(np.array(values, dtype=np.int64)).tolist() == expected
    assert popcount(torch.tensor(values, dtype=torch.int64)).tolist() == expected


@pytest.mark.parametrize("places", [1, 63, 64, 65, 1000])
def test_a_bitmap_knows_how_many_came_before(places: int) -> None:
    kept = np.random.default_rng(places).random(places) < 0.4
    kept[-1] = True
    expected = np.where(kept, np.cumsum(kept) - 1, -1).tolist()
    bits, starts = bitmap(kept)
    assert locate(bits, starts, np.arange(places)).tolist() == expected
    assert locate(torch.from_numpy(bits), torch.from_numpy(starts), torch.arange(places)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["torch", "fbgemm"]))
def test_compacted_tables_give_the_masked_vectors_bit_for_bit(
    seed: int, rows: float, entries: float, backend: str
) -> None:
    """For all ids, whatever forms were chosen."""
    masks = drawn(seed, rows, entries)
    torch.manual_seed(seed)
    values = {name: torch.randn(mask.shape) for name, mask in masks.items()}
    tables = compacted(plan_of(FEATURES, masks, Spec(16), None), masks, values, backend)
    everything = np.arange(300)
    got = tables(single_ids({f.name: everything % f.num_ids for f in FEATURES})).to_dict()
    for feature in FEATURES:
        expected = values[feature.space] * torch.from_numpy(masks[feature.space])
        assert torch.equal(got[feature.name], expected[everything % feature.num_ids])


def test_bytes_of_every_form_by_hand() -> None:
    """100 ids of 16 columns, by the formats' definitions; the smallest is taken."""
    space, spec = et.Feature("f", 100), Spec(16)
    first, narrow, scattered, single = (np.zeros((100, 16), dtype=bool) for _ in range(4))
    first[:30] = True
    assert smallest(space, first, spec).nbytes == 30 * 64  # the first rows, no map
    narrow[10:90, :3] = True
    narrow[40:60] = False
    mapped, without = 60 * 12 + 2 * 12, 90 * 12
    assert smallest(space, narrow, spec).nbytes == min(mapped, without) == mapped
    scattered[::3, ::2] = True
    bits = math.ceil(34 * 16 / 64) * 12
    assert smallest(space, scattered, spec).nbytes == 34 * 8 * 4 + bits + 2 * 12
    single[50, 7] = True
    csr = 4 + 1 + 2 * 4 + 2 * 12
    assert smallest(space, single, spec).nbytes == min(csr, 8 * 4 + 24, 4 + 12 + 24)


def test_ninety_per_cent_sparse_is_not_ten_times_smaller() -> None:
    space = et.Feature("f", 10_000)
    mask = np.random.default_rng(0).random((10_000, 16)) < 0.1
    found = smallest(space, mask, Spec(16)).nbytes / (10_000 * 64)
    assert 0.13 < found < 0.16
    assert found == pytest.approx(mask.mean() + 12 / 64 / 4, abs=0.02)  # values, and 1.5 bits an entry


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.002, 1.1), st.sampled_from(["normal", "few", "tied"]))
def test_the_most_that_fits_fits(seed: int, share: float, kind: str) -> None:
    spaces, random = id_spaces(FEATURES), np.random.default_rng(seed)
    scores = {s.name: random.standard_normal((s.num_ids, 16)) for s in spaces}
    if kind == "few":
        scores = {name: np.where(random.random(each.shape) < 0.9, -np.inf, each) for name, each in scores.items()}
    if kind == "tied":
        scores = {name: each.round() for name, each in scores.items()}
    budget = int(share * 397 * 64)
    masks = largest_within(spaces, scores, budget, Spec(16), "m")
    assert nbytes_of(spaces, masks, Spec(16)) <= budget
    kept = np.concatenate([scores[s.name][masks[s.name]] for s in spaces])
    left = np.concatenate([scores[s.name][~masks[s.name]] for s in spaces])
    assert kept.min(initial=np.inf) > left.max(initial=-np.inf)  # one threshold for all
    if (left > -np.inf).any():  # and the next entry would not fit
        more = {name: each >= left.max() for name, each in scores.items()}
        assert nbytes_of(spaces, more, Spec(16)) > budget


def test_a_budget_below_zeros_is_infeasible() -> None:
    scores = {s.name: np.zeros((s.num_ids, 16)) for s in id_spaces(FEATURES)}
    with pytest.raises(et.InfeasibleBudget, match="'m' cannot fit into 11 B") as caught:
        largest_within(id_spaces(FEATURES), scores, 11, Spec(16), "m")
    assert caught.value.min_bytes == 12


def test_a_space_that_keeps_all_rows_beside_one_that_does_not() -> None:
    # Both are cut to the same width without a bitmap, so they differ in constants alone.
    masks = {"whole": np.zeros((4, 4), bool), "half": np.zeros((4, 4), bool)}
    masks["whole"][:, :3] = True
    masks["half"][:2, :3] = True
    features = [et.Feature("whole", 4), et.Feature("half", 4)]
    plan = plan_of(features, masks, Spec(4), None)
    assert {e.method for e in plan.encodings.values()} == {"pruned"}
    assert [table.shape for table in plan.tables.values()] == ["4 x 3 fp32", "2 x 3 fp32"]
    rows = {name: torch.randn(4, 4) for name in masks}
    found = compacted(plan, masks, rows).vectors(single_ids({name: np.arange(4) for name in masks}))
    for i, (name, mask) in enumerate(masks.items()):
        assert torch.equal(found[:, i], rows[name] * torch.from_numpy(mask)), name
