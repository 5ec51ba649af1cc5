"""Multi-hash: sums of independent rows, plain and weighted."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.multihash import MultiHash


def made(num_ids: int, budget: object, **options: object) -> tuple[MultiHash, et.EmbeddingBagCollection]:
    plan = et.plan([et.Feature("f", num_ids)], "multihash", budget, dim=8, **options)
    encoding = plan.encoding("f")
    assert isinstance(encoding, MultiHash)
    return encoding, et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)


def rows_of(encoding: MultiHash, ids: np.ndarray) -> np.ndarray:
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return encoding.rows(ids[:, None], constants)


def bag(*ids: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["f"], torch.tensor(ids), lengths=torch.tensor([len(ids)]))


def test_a_vector_is_the_sum_of_exactly_its_rows() -> None:
    encoding, tables = made(10_000, "0.1x", hashes=4)
    (rows,) = rows_of(encoding, np.array([1234]))
    assert len(rows) == 4
    table = tables.state_dict()["lookup.@multihash4"]
    torch.testing.assert_close(tables(bag(1234)).values()[0].detach(), table[torch.from_numpy(rows)].sum(0))


@pytest.mark.parametrize("hashes", [2, 3])
def test_two_ids_share_all_rows_as_rarely_as_independent_hashes_do(hashes: int) -> None:
    """20,000 ids on 40 rows: n^2 / 2R^k pairs agree on all k rows, within five standard deviations."""
    encoding, _ = made(20_000, 40 * 32, hashes=hashes)
    rows = rows_of(encoding, np.arange(20_000))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    pairs, expected = (counts * (counts - 1) // 2).sum(), 20_000 * 19_999 / 2 / 40**hashes
    assert abs(pairs - expected) < 5 * np.sqrt(expected)


def test_weights_are_the_ids_own_and_start_as_the_plain_sum() -> None:
    """P = 1 is the plain sum; then a bag adds up each id's rows times that id's scalars."""
    encoding, tables = made(10_000, "0.1x", weighted=True)
    state = tables.state_dict()
    values, scalars = state["lookup.@weighted2"], state["lookup.@weighted2@scalars"]
    ids = np.array([17, 903])
    rows = torch.from_numpy(rows_of(encoding, ids))
    torch.testing.assert_close(tables(bag(17)).values()[0].detach(), values[rows[0, :2]].sum(0))
    scalars.normal_()
    tables.load_state_dict(state)
    p, e = scalars[rows[:, 2]], values[rows[:, :2]]
    expected = sum(p[i, k] * e[i, k] for i in range(2) for k in range(2))
    torch.testing.assert_close(tables(bag(*ids)).values()[0].detach(), expected)


def test_scalars_get_half_the_bytes_but_no_more_than_a_row_per_id() -> None:
    feature = [et.Feature("a", 6_000), et.Feature("b", 4_000)]
    tables = et.plan(feature, "multihash", 32_000, dim=16, weighted=True).tables
    assert tables["@weighted2@scalars"].num_rows == 2_000
    assert tables["@weighted2"].num_rows == 250
    tables = et.plan(feature, "multihash", 400_000, dim=16, weighted=True).tables
    assert tables["@weighted2@scalars"].num_rows == 10_000
    assert tables["@weighted2"].num_rows == 5_000


@pytest.mark.parametrize(("options", "smallest"), [({}, 64), ({"weighted": True}, 72), ({"shared": False}, 128)])
def test_the_smallest_form_is_a_row(options: dict, smallest: int) -> None:
    features = [et.Feature("a", 1000), et.Feature("b", 1000)]
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(features, "multihash", smallest - 1, **options)
    assert caught.value.min_bytes == smallest
    assert et.plan(features, "multihash", smallest, **options).nbytes == smallest


def test_tables_apart_keep_spaces_dense_that_would_not_shrink() -> None:
    plan = et.plan([et.Feature("a", 1), et.Feature("b", 10_000)], "multihash", "0.1x", shared=False)
    assert plan.encoding("a").method == "dense"
    assert plan.encoding("b").tables == ("b", "b")


def test_no_hash_makes_no_sense() -> None:
    with pytest.raises(UserError, match="hashes must be at least 1; got 0"):
        et.plan([et.Feature("a", 10)], "multihash", "0.5x", hashes=0)
