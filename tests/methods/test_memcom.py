"""MEmCom: the hashing trick times a scalar per id."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.methods.memcom import MEmCom


def made() -> tuple[MEmCom, et.EmbeddingBagCollection]:
    plan = et.plan([et.Feature("f", 1000)], "memcom", "0.1x")
    encoding = plan.encoding("f")
    assert isinstance(encoding, MEmCom)
    return encoding, et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)


def vectors(tables: et.EmbeddingBagCollection, ids: np.ndarray) -> torch.Tensor:
    batch = KeyedJaggedTensor(["f"], torch.from_numpy(ids), lengths=torch.ones(len(ids)).int())
    return tables(batch).values().detach()


def test_scalars_start_at_one_which_is_the_hashing_trick() -> None:
    encoding, tables = made()
    constants = {name: torch.tensor(value) for name, value in encoding.constants().items()}
    rows = encoding.rows(torch.arange(1000)[:, None], constants)
    assert torch.equal(rows[:, 1], torch.arange(1000))
    state = tables.state_dict()
    assert torch.equal(state["lookup.f@scalars"], torch.ones(1000, 1))
    assert torch.equal(vectors(tables, np.arange(1000)), state["lookup.f@rows"][rows[:, 0]])
    assert int(rows[:, 0].min()) == 0
    assert int(rows[:, 0].max()) == encoding.num_rows - 1


def test_ids_that_share_a_row_have_vectors_on_one_line() -> None:
    encoding, tables = made()
    state = tables.state_dict()
    state["lookup.f@scalars"].copy_(torch.arange(1, 1001).unsqueeze(1) / 100)
    tables.load_state_dict(state)
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    rows = encoding.rows(np.arange(1000)[:, None], constants)[:, 0]
    (together,) = np.nonzero(rows == rows[0])
    found = vectors(tables, together)
    assert len(together) > 2
    assert torch.linalg.matrix_rank(found) == 1
    assert len(torch.unique(found[:, 0])) == len(together)  # and yet each is its own


def test_bytes_are_a_number_per_id_and_the_rows() -> None:
    smallest = 1000 * 4 + 64
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan([et.Feature("f", 1000)], "memcom", smallest - 1)
    assert caught.value.min_bytes == smallest
    plan = et.plan([et.Feature("f", 1000)], "memcom", smallest + 64 * 9)
    assert {name: table.num_rows for name, table in plan.tables.items()} == {"f@rows": 10, "f@scalars": 1000}


@pytest.mark.parametrize(("precision", "scalar_bytes"), [("fp32", 4), ("fp16", 2), ("int8", 4), ("int4", 4)])
def test_scalars_are_stored_in_the_fewest_bytes(precision: str, scalar_bytes: int) -> None:
    plan = et.plan([et.Feature("f", 100_000)], "memcom", "0.1x", dim=64, precision=precision)
    assert plan.tables["f@scalars"].nbytes == 100_000 * scalar_bytes


def test_a_space_of_width_one_stays_dense() -> None:
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan([et.Feature("f", 1000)], "memcom", "0.5x", dim=1)
    assert caught.value.min_bytes == 4000
