"""Tensor train: cores, their contraction, and what they cost."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.base import PartInit
from embtab.methods.tt import TensorTrain, factors, radices


def train(plan: et.Plan) -> TensorTrain:
    encoding = plan.encoding("f")
    assert isinstance(encoding, TensorTrain)
    return encoding


def test_a_million_ids_take_60800_numbers() -> None:
    million = [et.Feature("f", 10**6)]
    plan = et.plan(million, "tt", 4 * 60_800)
    encoding = train(plan)
    assert (encoding.p, encoding.q, encoding.ranks) == ((100, 100, 100), (2, 2, 4), (16, 16))
    assert plan.nbytes == 4 * 60_800
    assert [(t.num_rows, t.width) for t in plan.tables.values()] == [(100, 32), (100, 512), (100, 64)]
    assert train(et.plan(million, "tt", 4 * 60_800 - 1)).ranks == (15, 16)


def test_lookups_are_rows_of_the_full_contraction() -> None:
    """The whole table multiplied out, [p1 p2 p3, D], against a lookup of every id."""
    plan = et.plan([et.Feature("f", 990)], "tt", "0.2x", dim=12)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    (p1, p2, p3), (q1, q2, q3), (r1, r2) = train(plan).p, train(plan).q, train(plan).ranks
    first, second, third = (tables.state_dict()[f"lookup.f@core{k}"].numpy() for k in (1, 2, 3))
    full = np.einsum(
        "iar,jrbs,ksc->ijkabc",
        first.reshape(p1, q1, r1),
        second.reshape(p2, r1, q2, r2),
        third.reshape(p3, r2, q3),
    ).reshape(p1 * p2 * p3, 12)
    assert len(full) >= 990
    batch = KeyedJaggedTensor(["f"], torch.arange(990), lengths=torch.ones(990).int())
    np.testing.assert_allclose(tables(batch).values().detach().numpy(), full[:990], rtol=1e-4, atol=1e-5)


def test_full_ranks_can_represent_any_table() -> None:
    """Cores from two singular value decompositions of a random table give it back."""
    random, (p, q) = np.random.default_rng(0), ((3, 4, 2), (2, 2, 3))
    table = random.standard_normal((24, 12))
    entries = table.reshape(*p, *q).transpose(0, 3, 1, 4, 2, 5)  # i1 j1 i2 j2 i3 j3
    u, s, v = np.linalg.svd(entries.reshape(6, -1), full_matrices=False)
    u2, s2, v2 = np.linalg.svd((s[:, None] * v).reshape(6 * 8, 6), full_matrices=False)
    cores = [
        u.reshape(3, 2 * 6),
        u2.reshape(6, 4, 2, 6).transpose(1, 0, 2, 3).reshape(4, 6 * 2 * 6),
        (s2[:, None] * v2).reshape(6, 2, 3).transpose(1, 0, 2).reshape(2, 6 * 3),
    ]
    encoding = TensorTrain(12, 24, ("1", "2", "3"), p, q, (6, 6))
    constants = {name: torch.tensor(value) for name, value in encoding.constants().items()}
    rows = encoding.rows(torch.arange(24)[:, None], constants)
    parts = [torch.from_numpy(core)[rows[:, k]] for k, core in enumerate(cores)]
    np.testing.assert_allclose(encoding.combine(parts, {}).numpy(), table, atol=1e-12)


def test_ids_of_num_ids_or_above_are_refused_though_the_cores_have_rows_for_them() -> None:
    plan = et.plan([et.Feature("f", 990)], "tt", "0.2x")
    assert math.prod(train(plan).p) > 990
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    with pytest.raises(UserError, match=r"id 990 .* outside \[0, 990\)"):
        tables(KeyedJaggedTensor(["f"], torch.tensor([990]), lengths=torch.tensor([1])))


def test_composed_entries_start_with_exactly_the_variance_asked_for() -> None:
    """The square of a sum over both ranks, term by term: E[xy] is E[x] E[y] unless x and y are one entry."""
    encoding = TensorTrain(16, 1000, ("1", "2", "3"), (10, 10, 10), (2, 2, 4), (7, 8))
    one, two, three = encoding.start(0.02)
    assert one.mean == 0

    def product(part: PartInit, same: bool) -> float:
        return part.mean**2 + same * part.std**2

    terms = list(itertools.product(range(7), range(8)))
    square = sum(
        product(one, a == c) * product(two, (a, b) == (c, d)) * product(three, b == d)
        for (a, b), (c, d) in itertools.product(terms, terms)
    )
    assert square == pytest.approx(0.02**2, rel=1e-12)


@given(num_ids=st.integers(1, 2**62))
def test_digits_reach_every_id(num_ids: int) -> None:
    p = radices(num_ids)
    assert math.prod(p) >= num_ids
    if num_ids > 1000:
        assert math.prod(p) < 1.4 * num_ids
        assert max(p) < 1.5 * min(p)


@given(num_ids=st.integers(1, 3000))
def test_digits_are_unique(num_ids: int) -> None:
    encoding = TensorTrain(16, num_ids, ("1", "2", "3"), radices(num_ids), (2, 2, 4), (1, 1))
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    rows = encoding.rows(np.arange(num_ids)[:, None], constants)
    assert len(np.unique(rows, axis=0)) == num_ids
    assert (rows.max(axis=0) < encoding.p).all()


@pytest.mark.parametrize(
    ("dim", "q"), [(1, (1, 1, 1)), (7, (1, 1, 7)), (12, (2, 2, 3)), (16, (2, 2, 4)), (32, (2, 4, 4)), (64, (4, 4, 4))]
)
def test_any_dimension_has_three_factors(dim: int, q: tuple[int, int, int]) -> None:
    assert factors(dim) == q


def test_the_smallest_form_has_ranks_of_one() -> None:
    smallest = 4 * (100 * 2 + 100 * 2 + 100 * 4)
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan([et.Feature("f", 10**6)], "tt", smallest - 1)
    assert caught.value.min_bytes == smallest
    assert et.plan([et.Feature("f", 10**6)], "tt", smallest).nbytes == smallest


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_budgets_are_used(share: float) -> None:
    features = [et.Feature(f"f{i}", n) for i, n in enumerate([30, 5_000, 300_000, 7_000_000])]
    plan = et.plan(features, "tt", f"{share}x")
    assert plan.budget is not None
    assert 0.9 * plan.budget <= plan.nbytes <= plan.budget
