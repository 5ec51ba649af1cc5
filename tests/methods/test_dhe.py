"""DHE: hashes and a decoder, no table."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.dhe import BUCKETS, DHE


def dhe(plan: et.Plan) -> DHE:
    encoding = plan.encoding("f")
    assert isinstance(encoding, DHE)
    return encoding


def planned(budget: object = "0.3x", num_ids: int = 5000, **options: object) -> et.Plan:
    return et.plan([et.Feature("f", num_ids)], "dhe", budget, **options)


def codes(encoding: DHE, ids: np.ndarray) -> np.ndarray:
    """[N, hashes]: what the decoder reads."""
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return 2 * encoding.rows(ids[:, None], constants) / (BUCKETS - 1) - 1


def test_codes_are_uniform_in_minus_one_to_one_and_independent() -> None:
    encoding = dhe(planned())
    spread = codes(encoding, np.arange(20_000) * 1_000_003)
    assert spread.min() >= -1
    assert spread.max() <= 1
    # Mean 0 and variance 1/3, each within six standard errors for every one of the hashes.
    assert np.abs(spread.mean(axis=0)).max() < 6 * np.sqrt(1 / 3 / 20_000)
    assert np.abs(spread.var(axis=0) - 1 / 3).max() < 6 * np.sqrt(4 / 45 / 20_000)
    correlations = np.corrcoef(spread.T) - np.eye(encoding.hashes)
    assert np.abs(correlations).max() < 6 / np.sqrt(20_000)


def test_codes_stay_in_range_for_every_int64() -> None:
    ids = np.array([0, -1, 2**31, 2**53 + 1, 2**62, 2**62 + 1, 2**63 - 1, -(2**63)])
    extreme = codes(dhe(planned()), ids)
    assert np.abs(extreme).max() <= 1
    assert len(np.unique(extreme, axis=0)) == len(ids)


def test_there_is_no_table_and_the_decoder_counts() -> None:
    plan = planned(40_000)
    encoding = dhe(plan)
    assert plan.tables == {}
    assert encoding.hashes == encoding.width  # narrower than the most hashes
    width = encoding.width
    numbers = (width + 1) * width + (width + 1) * width + (width + 1) * 16
    assert plan.nbytes == 4 * numbers <= 40_000
    assert 4 * ((width + 2) * (width + 1) * 2 + (width + 2) * 16) > 40_000
    assert sum(p.numel() for p in et.EmbeddingBagCollection(plan).parameters()) == numbers


def test_wide_decoders_read_no_more_hashes_than_asked_for() -> None:
    encoding = dhe(planned("0.5x", 50_000))
    assert encoding.hashes == 128 < encoding.width
    few = dhe(planned("0.5x", 50_000, hashes=32, layers=1))
    assert (few.hashes, few.layer_shapes()) == (32, [(few.width, 32), (16, few.width)])


def test_a_vector_depends_on_its_id_alone() -> None:
    """Not on the rest of the batch, nor on training mode, as batch normalisation would make it."""
    tables = et.EmbeddingBagCollection(planned(), backend="torch", init_std=1.0)

    def vector(*others: int) -> torch.Tensor:
        ids = torch.tensor([7, 7, *others])
        return tables(KeyedJaggedTensor(["f"], ids, lengths=torch.ones(len(ids)).int())).values().detach()

    alone = vector()
    torch.testing.assert_close(alone[0], alone[1])
    torch.testing.assert_close(vector(1, 2, 3)[0], alone[0])
    tables.eval()
    torch.testing.assert_close(vector(1, 2, 3)[0], alone[0])


def test_gradients_reach_every_layer_and_ids_can_be_told_apart() -> None:
    """A hundred ids learn a hundred random vectors."""
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(planned("20kB"), backend="torch", init_std=0.1)
    batch = KeyedJaggedTensor(["f"], torch.arange(100), lengths=torch.ones(100).int())
    target = torch.randn(100, 16) * 0.1
    optimizer = torch.optim.Adam(tables.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((tables(batch).values() - target) ** 2).mean()
        loss.backward()
        optimizer.step()
    assert all(float(p.grad.abs().max()) > 0 for p in tables.parameters() if p.grad is not None)
    assert float(loss.detach()) < 0.1 * 0.01


def test_small_spaces_stay_dense_and_the_smallest_decoder_is_said() -> None:
    plan = et.plan([et.Feature("few", 3), et.Feature("f", 5000)], "dhe", "0.1x")
    assert plan.encoding("few").method == "dense"
    smallest = 4 * (2 + 2 + 2 * 16)
    with pytest.raises(et.InfeasibleBudget) as caught:
        planned(smallest - 1)
    assert caught.value.min_bytes == smallest
    assert planned(smallest).nbytes == smallest


@pytest.mark.parametrize("options", [{"hashes": 0}, {"layers": 0}])
def test_decoders_that_make_no_sense(options: dict) -> None:
    with pytest.raises(UserError, match="hashes and layers must be at least 1"):
        planned(**options)
