"""Ids that leave a batch ahead change no number."""

import pytest
import sharded
import torch

import embtab as et
from embtab.errors import UserError
from embtab.sharding.pipeline import ids_of, tensors_of
from embtab.sharding.strategy import pipelined

# By case, how it is spread, and torchrec's modules for it: bags that are sums, and products of single ids; rows that
# travel by id; nothing that travels.
PLANS = {"mixed": ("row_wise", 2), "qr sum": ("row_wise_ids", 1), "hash": ("auto", 0)}


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "gpu"), [(2, False), pytest.param(1, True, marks=ON_A_GPU)])
def test_a_pipeline_changes_no_number_and_sends_ahead(tmp_path, processes, gpu):
    runs = [(name, "rowwise_adagrad", plan) for name, (plan, _) in PLANS.items()]
    sharded.spawn(sharded.run_pipelined, processes, str(tmp_path), runs, gpu)
    found = torch.load(tmp_path / "pipelined.pt", weights_only=True)
    for name, (_, modules) in PLANS.items():
        losses, validated, tables, _ = found[name, False]
        assert len(losses) == 2 * sharded.STEPS
        assert len(validated) > 4 * sharded.STEPS, "twice an epoch, and before the first"
        expected = torch.tensor(losses + validated), tables
        piped = torch.tensor(found[name, True][0] + found[name, True][1]), found[name, True][2]
        torch.testing.assert_close(piped, expected, rtol=0, atol=1e-6 if gpu else 0)
        sent, ahead = (away_when_read(found[name, pipeline][3]) for pipeline in (False, True))
        assert max(sent, default=0) == min(modules, 1), "without a pipeline, rows leave when they are asked for"
        assert max(ahead, default=0) == 2 * modules, "with one, two batches leave before the first is read"


def away_when_read(order: list[str]) -> list[int]:
    """Whenever a module answers, what had been sent to modules and not been answered."""
    away, found = 0, []
    for event in order:
        if event == "input_dist":
            away += 1
        else:
            found.append(away)
            away -= 1
    return found


def tables_of(method: str) -> et.EmbeddingBagCollection:
    return et.EmbeddingBagCollection(et.plan([et.Feature("item", 1000)], method, "0.5x", dim=8))


def test_what_a_pipeline_cannot_do_is_refused():
    tables = tables_of("hash")
    assert pipelined({"tables": tables}) is tables
    with pytest.raises(UserError, match="one EmbeddingBagCollection and no other"):
        pipelined({"a": tables, "b": tables})
    with pytest.raises(UserError, match="one EmbeddingBagCollection and no other"):
        pipelined({})
    with pytest.raises(UserError, match="method 'cafe' of 'item' changes them between batches"):
        pipelined({"tables": tables_of("cafe")})
    bags, label = sharded.batches(0, 1)[0]
    assert ids_of((bags, label)) is bags
    with pytest.raises(UserError, match="there are 2"):
        ids_of([bags, label, bags])


def test_every_tensor_of_a_batch_is_kept_for_the_stream_that_uses_it():
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("item", 1000)], "qr", "0.5x", dim=8))
    bags, _ = sharded.batches(0, 1)[1]
    bags = type(bags)(["item"], bags.values()[:4], weights=torch.ones(4), lengths=torch.tensor([2, 2]))
    asked = tables.asked(bags)
    kept = memory(tensors_of([asked, bags]))
    (way,) = asked.ways
    wanted = [asked.cut.ids, way.rows, asked.requests[0].rows, bags.values(), bags.lengths(), bags.weights()]
    assert memory(wanted) <= kept
    assert not kept & memory(tables.state_dict(keep_vars=True).values()), "these live on anyway"


def memory(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
