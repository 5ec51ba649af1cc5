"""What each method promises beyond the common laws: worked values and the mistakes of published code."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.methods.qr import QR


def qr(num_ids: int, collisions: int) -> QR:
    return QR(4, num_ids, ("q", "r"), collisions, "product")


def rows_of(encoding: QR, ids: list[int]) -> np.ndarray:
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return encoding.rows(np.array(ids)[:, None], constants)


def test_quotient_and_remainder_are_unique_together() -> None:
    pairs = rows_of(qr(1000, 7), list(range(1000)))
    assert len({tuple(pair) for pair in pairs.tolist()}) == 1000
    assert pairs.max(axis=0).tolist() == [142, 6]  # 143 + 7 rows


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_quotients_are_exact_above_the_floats(kind: str) -> None:
    """A float32 quotient gives 4,194,305 for the first; float64 fails above 2^53."""
    ids = [16_777_219, 67_108_871, 2**53 + 5, 2**62 + 3]
    encoding = qr(2**63 - 1, 4)
    assert encoding.num_ids is not None
    constants = {name: torch.tensor(value) for name, value in encoding.constants().items()}
    rows = rows_of(encoding, ids) if kind == "numpy" else encoding.rows(torch.tensor(ids)[:, None], constants)
    assert rows[:, 0].tolist() == [id_ // 4 for id_ in ids]
    assert rows[:, 0].tolist()[:2] == [4_194_304, 16_777_217]


def bag_of_two(op: str, weights: list[float] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pooled bag [17, 903] of a feature of 1000 ids, and the two ids' quotient and remainder rows [2, D]."""
    plan = et.plan([et.Feature("f", 1000)], {"name": "qr", "op": op}, "0.2x", dim=8)
    encoding = plan.encoding("f")
    assert isinstance(encoding, QR)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    state = tables.state_dict()
    ids = torch.tensor([17, 903])
    batch = KeyedJaggedTensor(
        ["f"], ids, lengths=torch.tensor([2]), weights=None if weights is None else torch.tensor(weights)
    )
    q = state["lookup.f@quotient"][ids // encoding.collisions]
    r = state["lookup.f@remainder"][ids % encoding.collisions]
    return tables(batch).values()[0].detach(), q, r


def test_product_is_formed_per_id_before_pooling() -> None:
    pooled, q, r = bag_of_two("product")
    torch.testing.assert_close(pooled, (q * r).sum(0))
    pooled_first = q.sum(0) * r.sum(0)  # what the published code computes
    assert (pooled - pooled_first).norm() / pooled.norm() > 0.1


def test_product_applies_a_weight_once() -> None:
    pooled, q, r = bag_of_two("product", [3.0, -1.0])
    torch.testing.assert_close(pooled, 3 * q[0] * r[0] - q[1] * r[1])


def test_sum_may_be_pooled_first() -> None:
    pooled, q, r = bag_of_two("sum")
    torch.testing.assert_close(pooled, q.sum(0) + r.sum(0))


@pytest.mark.parametrize("n", [4, 5, 99, 1000, 10**6, 10**7 + 19])
def test_smallest_qr_is_the_smallest(n: int) -> None:
    feature = [et.Feature("f", n)]
    best = min(-(-n // c) + c for c in range(2, min(n, 20_000) + 1))
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(feature, {"name": "qr", "op": "sum"}, 1, dim=4)
    assert caught.value.min_bytes == min(best, n) * 16


def test_unified_chunks_keep_their_order_beyond_ten() -> None:
    """Chunk j fills columns [j * W, (j + 1) * W), also for j >= 10 (a lexicographic order would put 10 before 2)."""
    plan = et.plan([et.Feature("f", 10_000)], "unified", "0.1x", dim=48, chunks=12)
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    encoding = plan.encoding("f")
    constants = {name: torch.tensor(value) for name, value in encoding.constants().items()}
    rows = encoding.rows(torch.tensor([[123]]), constants)[0]
    table = tables.state_dict()["lookup.@unified4"]
    vector = tables(KeyedJaggedTensor(["f"], torch.tensor([123]), lengths=torch.tensor([1]))).values()[0]
    for j in range(12):
        assert torch.equal(vector[4 * j : 4 * j + 4], table[rows[j]])


def test_adding_a_feature_to_a_unified_table_costs_nothing() -> None:
    one = et.plan([et.Feature("a", 10_000)], "unified", "40kB")
    two = et.plan([et.Feature("a", 10_000), et.Feature("b", 50_000)], "unified", "40kB")
    assert one.nbytes == two.nbytes
    assert dict(one.tables) == dict(two.tables)


def test_features_hashed_to_one_row_share_its_gradient() -> None:
    """With a single row every feature reads it, and its gradient is the sum of theirs."""
    plan = et.plan([et.Feature("a", 100), et.Feature("b", 100)], "unified", 32, chunks=2)
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    batch = KeyedJaggedTensor(["a", "b"], torch.tensor([5, 7]), lengths=torch.tensor([1, 1]))
    tables(batch).values().sum().backward()
    (parameter,) = tables.parameters()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [[4.0] * 8]  # two features of two chunks
