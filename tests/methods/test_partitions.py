"""Complementary partitions: unique, refused where they are not, and as large as the budget."""

import math
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.partitions import Partitions, coprime_moduli, radix_moduli
from embtab.methods.qr import QR


def partitions(num_ids: int, moduli: tuple[int, ...], kind: str, op: str = "product") -> Partitions:
    return Partitions(12, num_ids, tuple(f"f@part{j}" for j in range(len(moduli))), moduli, kind, op)


def rows_of(encoding: et.methods.Encoding, ids: np.ndarray) -> np.ndarray:
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return encoding.rows(ids[:, None], constants)


@pytest.mark.parametrize(
    ("num_ids", "moduli", "kind"), [(60, (3, 4, 5), "radix"), (60, (3, 4, 5), "crt"), (1001, (7, 11, 13), "crt")]
)
def test_every_id_has_rows_of_its_own(num_ids: int, moduli: tuple[int, ...], kind: str) -> None:
    rows = rows_of(partitions(num_ids, moduli, kind), np.arange(num_ids))
    assert len({tuple(row) for row in rows.tolist()}) == num_ids
    assert rows.max(axis=0).tolist() == [modulus - 1 for modulus in moduli]


def test_rows_are_digits_or_residues() -> None:
    id_ = np.array([47])
    assert rows_of(partitions(60, (3, 4, 5), "radix"), id_).tolist() == [[2, 3, 3]]  # 2 + 3 * (3 + 4 * 3) = 47
    assert rows_of(partitions(60, (3, 4, 5), "crt"), id_).tolist() == [[2, 3, 2]]


@pytest.mark.parametrize(
    ("num_ids", "moduli", "kind", "message"),
    [
        (49, (3, 4, 4), "radix", r"product of moduli \(3, 4, 4\) must reach the 49 ids"),
        (49, (3, 4, 4), "crt", "must reach the 49 ids"),
        (60, (6, 10), "crt", r"pairwise co-prime; got \(6, 10\)"),
    ],
)
def test_partitions_that_are_not_complementary_are_refused(
    num_ids: int, moduli: tuple[int, ...], kind: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        partitions(num_ids, moduli, kind)


def test_a_plan_with_moduli_that_repeat_rows_cannot_be_read() -> None:
    described = et.plan([et.Feature("f", 1001)], "partitions", 40 * 64, kind="crt").to_dict()
    described["encodings"]["f"]["moduli"] = [10, 10, 14]
    with pytest.raises(UserError, match="co-prime"):
        et.Plan.from_dict(described)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), num_ids=st.integers(1, 3000), parts=st.integers(2, 6))
@pytest.mark.parametrize(("kind", "moduli_for"), [("radix", radix_moduli), ("crt", coprime_moduli)])
def test_solved_moduli_fit_and_are_unique(data, kind: str, moduli_for, num_ids: int, parts: int) -> None:
    num_rows = data.draw(st.integers(0, num_ids) | st.integers(0, parts * num_ids))
    smallest, moduli = (moduli_for(num_ids, parts, rows) for rows in (0, num_rows))
    assert len(moduli) == parts
    assert max(moduli) <= num_ids  # further rows would never be read
    assert sum(smallest) <= sum(moduli) <= max(num_rows, sum(smallest))
    rows = rows_of(partitions(num_ids, moduli, kind), np.arange(num_ids))
    assert len({tuple(row) for row in rows.tolist()}) == num_ids
    assert np.all(rows.max(axis=0) < moduli)


@pytest.mark.parametrize("num_ids", [1, 2, 7, 60, 421, 999])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("kind", ["radix", "crt"])
def test_the_smallest_moduli_are_the_smallest(num_ids: int, parts: int, kind: str) -> None:
    """Against every choice of moduli up to a bound that the best cannot exceed."""
    bound = 2 * math.ceil(num_ids ** (1 / parts)) + 8
    moduli_for = radix_moduli if kind == "radix" else coprime_moduli
    best = min(
        sum(moduli)
        for moduli in combinations_with_replacement(range(1, bound + 1), parts)
        if math.prod(moduli) >= num_ids
        and (kind == "radix" or all(math.gcd(a, b) == 1 for a, b in combinations(moduli, 2)))
    )
    assert sum(moduli_for(num_ids, parts, 0)) == best


@pytest.mark.parametrize("num_ids", [50, 1000])
def test_the_first_radix_modulus_is_the_largest_possible(num_ids: int) -> None:
    """By trying all moduli of the same number of rows."""
    for num_rows in range(sum(radix_moduli(num_ids, 3, 0)), num_ids // 2):
        best = max(
            first
            for first in range(1, num_rows - 1)
            for others in [((num_rows - first + 1) // 2, (num_rows - first) // 2)]
            if first * math.prod(others) >= num_ids
        )
        assert radix_moduli(num_ids, 3, num_rows)[0] == best


def test_a_million_ids_take_three_cube_roots() -> None:
    million = [et.Feature("f", 10**6)]
    plan = et.plan(million, "partitions", 300 * 64)
    assert [table.num_rows for table in plan.tables.values()] == [100, 100, 100]
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(million, "partitions", 300 * 64 - 1)
    assert caught.value.min_bytes == 300 * 64
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(million, "partitions", 1, kind="crt")
    assert caught.value.min_bytes == (101 + 100 + 99 + 1) * 64  # 101 * 100 * 99 falls short by 100


@pytest.mark.parametrize("options", [{}, {"kind": "crt"}, {"kind": "crt", "op": "concat", "parts": 2}, {"parts": 5}])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01, 0.0005])
def test_budgets_are_used(options: dict, share: float) -> None:
    features = [et.Feature(f"f{i}", n) for i, n in enumerate([3, 500, 100_000, 2_200_000, 10_131_227])]
    plan = et.plan(features, "partitions", f"{share}x", **options)
    assert plan.budget is not None
    assert 0.99 * plan.budget <= plan.nbytes <= plan.budget


def test_two_radix_parts_are_quotient_and_remainder() -> None:
    """The same rows as QR with as many collisions as the first modulus, the parts in the other order."""
    ids = np.array([0, 1, 999, 16_777_219, 67_108_871, 2**53 + 5])
    ours = rows_of(partitions(2**60, (4, 2**58), "radix"), ids)
    theirs = rows_of(QR(12, 2**60, ("q", "r"), 4, "product"), ids)
    assert ours[:, ::-1].tolist() == theirs.tolist()
    assert ours[3].tolist() == [3, 4_194_304]  # float32 division gives 4,194,305


@pytest.mark.parametrize("op", ["product", "sum", "concat"])
def test_bags_are_composed_per_id_and_weighted_once(op: str) -> None:
    plan = et.plan([et.Feature("f", 1000)], {"name": "partitions", "op": op, "kind": "crt"}, "0.1x", dim=12)
    encoding = plan.encoding("f")
    assert isinstance(encoding, Partitions)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    state = tables.state_dict()
    vectors = []
    for id_ in (17, 903):
        parts = [state[f"lookup.f@part{j}"][id_ % modulus] for j, modulus in enumerate(encoding.moduli)]
        whole = {"product": lambda p: p[0] * p[1] * p[2], "sum": sum, "concat": torch.cat}[op]
        vectors.append(whole(parts))
    batch = KeyedJaggedTensor(["f"], torch.tensor([17, 903]), torch.tensor([3.0, -1.0]), lengths=torch.tensor([2]))
    torch.testing.assert_close(tables(batch).values()[0], 3 * vectors[0] - vectors[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "prime"}, "kind must be one of radix, crt; got 'prime'"),
        ({"op": "max"}, "partitions: op must be one of concat, sum, product; got 'max'"),
        ({"parts": 1}, "parts must be a whole number from 2 to 8; got 1"),
        ({"parts": 2.0}, "option parts must be int, got 2.0"),
        ({"op": "concat"}, "op 'concat' cuts dim into 3 equal parts; got dim=16"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        et.plan([et.Feature("f", 1000)], "partitions", "0.5x", **options)
