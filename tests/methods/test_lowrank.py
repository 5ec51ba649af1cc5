"""Low rank: linear, exactly sized, and dense where a narrow table would not pay."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.methods.dense import Dense
from embtab.methods.lowrank import LowRank


def test_projecting_before_or_after_pooling_is_the_same() -> None:
    plan = et.plan([et.Feature("f", 1000)], "lowrank", "0.4x", dim=16)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    state = tables.state_dict()
    rows, projection = state["lookup.f"], state["arrays.f.projection"]
    ids, weights = torch.tensor([5, 5, 999]), torch.tensor([0.5, -2.0, 3.0])
    pooled = tables(KeyedJaggedTensor(["f"], ids, weights, lengths=torch.tensor([3]))).values()[0]
    torch.testing.assert_close(pooled, (weights[:, None] * (rows[ids] @ projection)).sum(0))
    torch.testing.assert_close(pooled, (weights[:, None] * rows[ids]).sum(0) @ projection)


def test_a_bias_belongs_to_each_id_of_a_bag_and_starts_at_zero() -> None:
    plan = et.plan([et.Feature("f", 1000)], {"name": "lowrank", "bias": True}, "0.4x", dim=16)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    state = tables.state_dict()
    assert not state["arrays.f.bias"].any()
    state["arrays.f.bias"] += torch.arange(16.0)
    tables.load_state_dict(state)
    ids, weights = torch.tensor([5, 5, 999]), torch.tensor([0.5, -2.0, 3.0])
    pooled = tables(KeyedJaggedTensor(["f"], ids, weights, lengths=torch.tensor([3]))).values()[0]
    without = (weights[:, None] * (state["lookup.f"][ids] @ state["arrays.f.projection"])).sum(0)
    torch.testing.assert_close(pooled, without + 1.5 * torch.arange(16.0))


def test_a_bias_counts_as_a_row_of_the_projection() -> None:
    """The rank of a table with a bias is that of a table without, given the bytes of one more vector."""
    feature = [et.Feature("f", 1000)]
    for rank in (1, 5, 15):
        nbytes = 4 * rank * (1000 + 16)
        assert et.plan(feature, "lowrank", nbytes).encoding("f") == LowRank(16, 1000, ("f",), rank)
        with_bias = et.plan(feature, {"name": "lowrank", "bias": True}, nbytes + 4 * 16)
        assert with_bias.nbytes == nbytes + 4 * 16
        assert with_bias.encoding("f") == LowRank(16, 1000, ("f",), rank, bias=True)


@given(num_ids=st.integers(1, 10**6), dim=st.integers(1, 64), budget=st.integers(1, 10**8))
def test_the_rank_is_the_largest_that_fits(num_ids: int, dim: int, budget: int) -> None:
    sizes = {rank: 4 * rank * (num_ids + dim) for rank in range(1, dim)}
    dense = 4 * num_ids * dim
    sizes = {rank: size for rank, size in sizes.items() if size < dense} | {dim: dense}
    try:
        plan = et.plan([et.Feature("f", num_ids)], "lowrank", budget, dim)
    except et.InfeasibleBudget as error:
        assert error.min_bytes == min(sizes.values()) > budget
        return
    encoding = plan.encoding("f")
    rank = encoding.rank if isinstance(encoding, LowRank) else dim
    assert rank == max(rank for rank, size in sizes.items() if size <= budget)
    assert plan.nbytes == sizes[rank]


def test_a_budget_for_the_dense_table_gives_the_dense_table() -> None:
    feature = [et.Feature("f", 1000)]
    assert isinstance(et.plan(feature, "lowrank", 64_000).encoding("f"), Dense)
    assert isinstance(et.plan(feature, "lowrank", 63_999).encoding("f"), LowRank)


def test_rows_are_counted_in_their_precision_and_projections_in_full() -> None:
    feature = [et.Feature("f", 1000)]
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(feature, "lowrank", 1, precision="int8")
    assert caught.value.min_bytes == 1000 * (1 + 4) + 16 * 4
    plan = et.plan(feature, "lowrank", 1000 * (7 + 4) + 7 * 16 * 4, precision="int8")
    assert plan.bytes_by_part() == {"f": 11_000, "f.projection": 448}


def test_any_matrix_of_that_rank_can_be_represented() -> None:
    plan = et.plan([et.Feature("f", 200)], "lowrank", 4 * 3 * (200 + 16))
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    random = np.random.default_rng(0)
    wanted = random.standard_normal((200, 3)) @ random.standard_normal((3, 16))
    u, s, v = np.linalg.svd(wanted, full_matrices=False)
    state = {"lookup.f": torch.tensor(u[:, :3] * s[:3]), "arrays.f.projection": torch.tensor(v[:3])}
    tables.load_state_dict(state)
    batch = KeyedJaggedTensor(["f"], torch.arange(200), lengths=torch.ones(200).int())
    np.testing.assert_allclose(tables(batch).values().detach().numpy(), wanted, atol=1e-5)
