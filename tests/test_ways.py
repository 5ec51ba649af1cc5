"""However a batch goes from ids to vectors, the vectors and what training makes of the tables are the same."""

import shutil

import numpy as np
import pytest
import torch
from laws import CASES, DIM, FEATURES, Case
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.tables import dispatch as ways
from embtab.tables.dedup import distinct, gathered

ROWS = 6
NAMES = [feature.name for feature in FEATURES]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def lengths_of(kind: str) -> np.ndarray:
    """Bag lengths [F, B]."""
    if kind == "ragged":
        return np.random.default_rng(1).integers(0, 4, (len(NAMES), ROWS))
    return np.full((len(NAMES), ROWS), {"one id": 1, "three ids": 3}[kind])


def batch(kind: str, weighted: bool = False) -> KeyedJaggedTensor:
    rng, lengths = np.random.default_rng(0), lengths_of(kind)
    # Few ids, so that they repeat within and between bags.
    counts = lengths.sum(1)
    values = np.concatenate([rng.integers(0, min(f.num_ids, 7), n) for f, n in zip(FEATURES, counts, strict=True)])
    weights = torch.from_numpy(rng.normal(size=len(values)).astype(np.float32)) if weighted else None
    return KeyedJaggedTensor(NAMES, torch.from_numpy(values), weights, torch.from_numpy(lengths.ravel()))


def trained(case: Case, kind: str, seen: set[str]) -> list[torch.Tensor]:
    """Vectors, and all tables and arrays after one step of SGD."""
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(case.plan(), optimizer=et.Optimizer("sgd", 0.1), init_std=1.0)
    found = tables.vectors(batch(kind))
    seen |= {type(way).__name__ for way in tables_ways}
    tables_ways.clear()
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for parameter in tables.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return [found.detach(), *(value.clone() for value in tables.state_dict().values())]


tables_ways: list[ways.Way] = []


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes note of the ways that batches go."""
    chosen = ways.ways_of

    def ways_of(*arguments):
        found = chosen(*arguments)
        assert sorted(place for way in found for place in way.places) == list(range(len(arguments[0].sizes)))
        tables_ways.extend(found)
        return found

    monkeypatch.setattr("embtab.tables.collections.ways_of", ways_of)


def plainly(cut, blocks, pools, stacked) -> list[ways.Way]:
    """Every block on its own."""
    return [ways.PerBag(block, cut, pools(block.encoding)) for block in blocks]


@every_case
@pytest.mark.parametrize("kind", ["one id", "three ids", "ragged"])
def test_every_way_gives_the_same_vectors_and_the_same_training(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch, taken: None
) -> None:
    seen: set[str] = set()
    results = [trained(case, kind, seen)]
    monkeypatch.setattr(ways, "DISTINCT_FROM", 1)
    results.append(trained(case, kind, seen))
    monkeypatch.setattr("embtab.tables.collections.ways_of", plainly)
    plain = trained(case, kind, set())
    for result in results:
        for mine, other in zip(result, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if case.name == "dense":
        assert seen == ({"Bare"})
    if case.name == "qr product":
        assert "PerDistinctId" in seen


def test_one_id_a_bag_reads_the_very_same_rows(taken: None) -> None:
    """Bit for bit, since nothing is added."""
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "unified", "0.3x", DIM))
    with torch.no_grad():
        quick = tables.vectors(batch("one id"))
        assert {type(way) for way in tables_ways} == {ways.OneEach}
        tables_ways.clear()
        ones = torch.ones(len(NAMES) * ROWS)
        given = batch("one id")
        plain = tables.vectors(KeyedJaggedTensor(NAMES, given.values(), ones, given.lengths()))
        assert {type(way) for way in tables_ways} == {ways.PerBag}
    tables_ways.clear()
    assert torch.equal(quick, plain)


@pytest.mark.parametrize("kind", ["one id", "three ids", "ragged"])
@pytest.mark.parametrize("distinct_from", [1, 10**6])
def test_the_keys_of_a_batch_may_come_in_any_order_and_among_others(kind, distinct_from, monkeypatch) -> None:
    """With methods whose features are computed in another order than the plan's."""
    monkeypatch.setattr(ways, "DISTINCT_FROM", distinct_from)
    method = {"shop": "dense", "user": "qr", "items": "hash", "*": "unified"}
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, method, "0.4x", DIM), init_std=1.0)
    given = batch(kind)
    lengths = given.lengths().view(len(NAMES), ROWS)
    order = [3, 0, 4, 2, 1]
    more = torch.arange(ROWS)
    values = torch.cat(
        [given[NAMES[i]].values() for i in order[:2]] + [more] + [given[NAMES[i]].values() for i in order[2:]]
    )
    counts = torch.cat([lengths[order[:2]].flatten(), torch.ones(ROWS).long(), lengths[order[2:]].flatten()])
    keys = [*(NAMES[i] for i in order[:2]), "other", *(NAMES[i] for i in order[2:])]
    with torch.no_grad():
        found = tables.vectors(KeyedJaggedTensor(keys, values, lengths=counts))
        torch.testing.assert_close(found, tables.vectors(given))
        monkeypatch.setattr("embtab.tables.collections.ways_of", plainly)
        torch.testing.assert_close(found, tables.vectors(given))


@every_case
@pytest.mark.parametrize("kind", ["one id", "ragged"])
def test_vectors_of_ids_are_the_same_once_or_each(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    features = [et.Feature(f.name, f.num_ids, "none", id_space=f.id_space) for f in FEATURES]
    for distinct_from in (1, 10**6):
        monkeypatch.setattr(ways, "DISTINCT_FROM", distinct_from)
        torch.manual_seed(0)
        tables = et.EmbeddingCollection(case.plan(features), optimizer=et.Optimizer("sgd", 0.1), init_std=1.0)
        found = tables(batch(kind))
        assert list(found) == NAMES
        assert torch.cat([found[name].lengths() for name in NAMES]).tolist() == batch(kind).lengths().tolist()
        vectors = torch.cat([found[name].values() for name in NAMES])
        vectors.backward(torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)))
        gradients = [p.grad for p in tables.parameters() if p.grad is not None]
        results.append([vectors.detach(), *gradients, *tables.lookup.state_dict().values()])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_case
def test_every_way_trains_under_autocast(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "DISTINCT_FROM", 1)
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(case.plan(), init_std=1.0)
    exact = tables.vectors(batch("three ids")).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = tables.vectors(batch("three ids"))
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)
    found.float().square().sum().backward()
    assert all(bool(value.isfinite().all()) for value in tables.state_dict().values() if value.is_floating_point())


def test_ids_that_are_no_numbers_of_a_vocabulary_go_the_plain_way(monkeypatch: pytest.MonkeyPatch, taken: None) -> None:
    monkeypatch.setattr(ways, "DISTINCT_FROM", 1)
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("user", 100)], "unified", "0.3x", 8))
    ids = torch.tensor([5, -(2**63), 2**63 - 1, 100])
    vectors = tables.vectors(KeyedJaggedTensor(["user"], ids, lengths=torch.ones(4).int()))
    assert {type(way) for way in tables_ways} == {ways.OneEach}
    tables_ways.clear()
    assert vectors.shape == (4, 1, 8)


@pytest.mark.parametrize("kind", ["one id", "three ids"])
@pytest.mark.parametrize("method", ["dense", "qr"])
@pytest.mark.parametrize("bad", [-1, 40])
def test_every_way_refuses_ids_out_of_range(kind: str, method: str, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "DISTINCT_FROM", 1)
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, method, None if method == "dense" else "0.3x", DIM))
    given = batch(kind)
    values = given.values().clone()
    values[given.offset_per_key()[1] + 2] = bad
    message = rf"feature 'shop' .*id {bad} at position 2 of its values is outside \[0, 40\)"
    with pytest.raises(UserError, match=message):
        tables.vectors(KeyedJaggedTensor(NAMES, values, lengths=given.lengths()))


@pytest.mark.parametrize("spare", [1, 10**6], ids=["marked", "sorted"])
def test_distinct_ids_are_those_of_numpy(spare: int) -> None:
    ids = np.random.default_rng(0).integers(0, 60, 100)
    found, places = distinct(ids, 60 * spare)
    unique, inverse = np.unique(ids, return_inverse=True)
    np.testing.assert_array_equal(found, unique)
    np.testing.assert_array_equal(places, inverse)
    assert places.dtype == np.int32


def test_gathered_is_an_embedding_bag_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 0, 1, 4])
    found, at = distinct(np.array([2, 2, 0, 5, 1, 5, 5, 2]), 6)
    places, vectors = torch.from_numpy(at), torch.randn(len(found), 3, requires_grad=True)
    offsets = torch.cat([torch.zeros(1).int(), lengths.cumsum(0).int()])
    bags = torch.arange(4).repeat_interleave(lengths)
    sums = gathered(vectors, places, offsets)
    each = vectors.detach()[places.long()]
    torch.testing.assert_close(sums, torch.zeros(4, 3).index_add(0, bags, each))
    gradient = torch.randn(4, 3)
    sums.backward(gradient)
    wanted = torch.zeros(len(found), 3).index_add(0, places.long(), gradient[bags])
    torch.testing.assert_close(vectors.grad, wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["hash", "unified", "qr", "tt"])
def test_compiled_rows_are_the_same_bit_by_bit(method: str) -> None:
    torch.manual_seed(0)
    plain, compiled = (et.EmbeddingBagCollection(et.plan(FEATURES, method, "0.3x", DIM), "torch") for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_rows()
    for kind in ("one id", "three ids", "ragged"):
        assert torch.equal(plain.vectors(batch(kind)), compiled.vectors(batch(kind)))


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "hash", "0.3x", DIM), "torch")
    with pytest.raises(UserError, match="no C\\+\\+ compiler 'no-such-compiler'"):
        tables.compile_rows()
