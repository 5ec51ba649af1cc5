"""ROBE: windows of one array, which overlap."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.robe import Robe


def planned(budget: object = 4000, num_ids: int = 1000, dim: int = 16, **options: object) -> et.Plan:
    return et.plan([et.Feature("a", num_ids), et.Feature("b", num_ids)], "robe", budget, dim, **options)


def robe(plan: et.Plan, name: str = "a") -> Robe:
    encoding = plan.encoding(name)
    assert isinstance(encoding, Robe)
    return encoding


def rows_of(encoding: Robe, ids: np.ndarray) -> np.ndarray:
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return encoding.rows(ids[:, None], constants)


def batch(ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["a", "b"], torch.cat([ids, ids]), lengths=torch.ones(2 * len(ids)).int())


def test_a_chunk_is_consecutive_rows_from_anywhere_but_the_last_window() -> None:
    """Chunks of 8 in rows of 2: four rows in a row, first ones 0 to rows - 4, each of them used."""
    encoding = robe(planned(granule=2))
    ids = np.concatenate([np.arange(100_000), [2**40 + 3, -1, 2**63 - 1, -(2**63)]])
    rows = rows_of(encoding, ids).reshape(-1, 2, 4)
    assert encoding.num_rows == 500
    np.testing.assert_array_equal(rows - rows[:, :, :1], np.broadcast_to(np.arange(4), rows.shape))
    assert np.unique(rows[:, :, 0]).tolist() == list(range(497))
    assert rows.max() == 499


def test_overlapping_windows_read_the_same_numbers() -> None:
    """Where two ids' windows are a granule apart, one vector continues in the other."""
    plan = planned()
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    rows = rows_of(robe(plan), np.arange(1000))
    one, other = next((i, j) for i in range(1000) for j in range(1000) if rows[j, 0] == rows[i, 0] + 1)
    vectors = tables(batch(torch.tensor([one, other])))["a"]
    assert torch.equal(vectors[0, 4:8], vectors[1, :4])


def test_changing_one_number_changes_the_vectors_whose_windows_cover_it() -> None:
    plan = planned()
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    before = tables(batch(torch.arange(1000)))["a"].detach()
    state = tables.state_dict()
    state["lookup.@robe8by4"][100, 2] += 1
    tables.load_state_dict(state)
    changed = (tables(batch(torch.arange(1000)))["a"].detach() != before).any(1)
    covering = (rows_of(robe(plan), np.arange(1000)) == 100).any(1)
    assert changed.tolist() == covering.tolist()
    assert abs(int(changed.sum()) - 1000 * 16 / 1000) < 5 * 4  # n D / M of them, within five standard deviations


def test_overlaps_add_up_in_the_gradient() -> None:
    """With a gradient of one everywhere, the array's gradient counts its readers, all spaces together."""
    plan = planned()
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    tables(batch(torch.arange(1000))).values().sum().backward()
    (parameter,) = tables.parameters()
    assert parameter.grad is not None
    readers = sum(np.bincount(rows_of(robe(plan, f), np.arange(1000)).ravel(), minlength=250) for f in "ab")
    assert parameter.grad[:, 0].tolist() == readers.tolist()
    assert float(parameter.grad.sum()) == 2 * 1000 * 16


def test_spaces_and_chunks_have_hashes_of_their_own() -> None:
    plan = planned(400_000, num_ids=10**6)
    starts = {(f, c): rows_of(robe(plan, f), np.arange(10_000))[:, 2 * c] for f in "ab" for c in range(2)}
    keys = list(starts)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert (starts[one] == starts[other]).mean() < 0.001


def test_as_many_numbers_as_the_dense_table_would_still_collide() -> None:
    """An array of n D numbers is not the dense table, so that is what such a budget gets."""
    assert planned(2 * 1000 * 64).encoding("a").method == "dense"
    nearly = robe(planned(2 * 1000 * 64 - 16))
    assert len(np.unique(rows_of(nearly, np.arange(1000)), axis=0)) == 1000
    assert len(np.unique(rows_of(nearly, np.arange(1000))[:, 0])) < 1000


@pytest.mark.parametrize(
    ("dim", "options", "shape"),
    [
        (16, {}, (1000, 4)),
        (12, {}, (1000, 4)),
        (6, {}, (2000, 2)),
        (5, {}, (4000, 1)),
        (16, {"chunk": 16, "granule": 8}, (500, 8)),
    ],
)
def test_granules_divide_any_dimension(dim: int, options: dict, shape: tuple[int, int]) -> None:
    (table,) = planned(16_000, num_ids=10_000, dim=dim, **options).tables.values()
    assert (table.num_rows, table.width) == shape


def test_the_smallest_form_is_one_window() -> None:
    with pytest.raises(et.InfeasibleBudget) as caught:
        planned(31)
    assert caught.value.min_bytes == 32
    assert planned(32).nbytes == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk": 5}, "chunk must divide dim; got chunk=5, dim=16"), ({"granule": 3}, "granule must divide chunk")],
)
def test_shapes_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(**options)
