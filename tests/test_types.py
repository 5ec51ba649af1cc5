"""Types and sizes: the same vectors, of the same type, whatever the number of ids, the backend and the width."""

import re
from functools import cache

import numpy as np
import pytest
import torch
from laws import CASES, DIM, FEATURES, Case, adapted, tables_of
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.reader import read as reader

BACKENDS = ["torch", "fbgemm", "native"]
NAMES = [feature.name for feature in FEATURES]
COUNTS = [4095, 4097]  # on both sides of where distinct ids are computed once
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("count", COUNTS)
pooled = pytest.mark.parametrize("kind", [et.EmbeddingBagCollection, et.EmbeddingCollection])


@cache
def batch(count: int, weights: torch.dtype | None = None) -> KeyedJaggedTensor:
    """So many ids, in 820 bags a feature: of one id, but for some that hold none or several."""
    random = np.random.default_rng(count)
    lengths = np.ones((len(NAMES), 820), np.int64)
    lengths[:, 0] += (count - lengths.sum()) // len(NAMES)
    lengths[0, 0] += count - lengths.sum()
    lengths[1, :3] = lengths[1, :3].sum(), 0, 0
    values = np.concatenate([random.integers(0, f.num_ids, n) for f, n in zip(FEATURES, lengths.sum(1), strict=True)])
    factors = None if weights is None else torch.from_numpy(random.uniform(-2, 2, count)).to(weights)
    return KeyedJaggedTensor(NAMES, torch.from_numpy(values), factors, torch.from_numpy(lengths.ravel()))


def answers(tables: torch.nn.Module, given: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    found = tables(given)
    return (
        found.to_dict() if isinstance(tables, et.EmbeddingBagCollection) else {k: v.values() for k, v in found.items()}
    )


def halves(given: KeyedJaggedTensor) -> list[KeyedJaggedTensor]:
    """The first 400 bags of every feature, and the others."""
    ids, lengths = given.values().split(given.length_per_key()), given.lengths().view(len(NAMES), -1)
    parts = [each.split([int(n[:400].sum()), int(n[400:].sum())]) for each, n in zip(ids, lengths, strict=True)]
    return [
        KeyedJaggedTensor(NAMES, torch.cat([part[i] for part in parts]), lengths=lengths[:, bags].flatten())
        for i, bags in enumerate([slice(0, 400), slice(400, None)])
    ]


def expected(tables: torch.nn.Module, given: KeyedJaggedTensor) -> dict[str, np.ndarray]:
    """By NumPy alone, in the tables' own precision."""
    plan, arrays, found = tables.plan.to_dict(), tables_of(tables), {}
    for name in NAMES:
        one = given[name]
        if isinstance(tables, et.EmbeddingBagCollection):
            weights = one.weights_or_none()
            factors = None if weights is None else weights.double().numpy()
            found[name] = reader.lookup(plan, arrays, name, one.values().numpy(), one.offsets().numpy(), factors)
        else:
            found[name] = reader.vectors(plan, arrays, name, one.values().numpy())
    return found


@cache
def made(case: Case, backend: str, kind: type, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return adapted(kind(case.plan(), backend, init_std=1.0)).eval().to(dtype)


@pooled
@both
@every_backend
@every_case
def test_vectors_are_numpys_on_both_sides_of_distinct_ids(case: Case, backend: str, count: int, kind: type) -> None:
    tables, given = made(case, backend, kind), batch(count)
    wanted = expected(tables, given)
    for name, found in answers(tables, given).items():
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.detach().numpy(), wanted[name], rtol=1e-4, atol=1e-4)


@pooled
@both
@every_case
def test_double_precision_stays_double(case: Case, count: int, kind: type) -> None:
    """In the last places too: as in two halves of the batch, which go the other way."""
    tables, given = made(case, "torch", kind, torch.float64), batch(count)
    wanted = [answers(tables, half) for half in halves(given)]
    for name, found in answers(tables, given).items():
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.cat([half[name] for half in wanted]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, et.EmbeddingBagCollection), (torch.float16, et.EmbeddingCollection)]
)
@both
@every_case
def test_half_precision_stays_half(case: Case, dtype: torch.dtype, count: int, kind: type) -> None:
    tables, given = made(case, "torch", kind, dtype), batch(count)
    wanted = answers(made(case, "torch", kind), given)
    for name, found in answers(tables, given).items():
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted[name], rtol=0.1, atol=0.3)


@every_backend
@every_case
def test_autocast_makes_one_type_of_any_number_of_ids(case: Case, backend: str) -> None:
    """What torch makes of the products in a method is the type of its vectors, one by one and pooled."""
    for kind in (et.EmbeddingBagCollection, et.EmbeddingCollection):
        types = []
        for count in (45, *COUNTS):
            given = batch(4100) if count == 45 else batch(count)
            if count == 45:
                given = KeyedJaggedTensor(NAMES, given.values()[:45] % 3, lengths=torch.full((45,), 1))
            with torch.autocast("cpu", torch.bfloat16):
                types.append({name: found.dtype for name, found in answers(made(case, backend, kind), given).items()})
        assert types[0] == types[1] == types[2]
        assert set(types[0].values()) <= {torch.float32, torch.bfloat16}
        if case.name in ("dense", "qr product", "unified"):
            assert set(types[0].values()) == {torch.float32}
        if case.name == "dhe" and kind is et.EmbeddingCollection:
            assert types[0]["user"] == torch.bfloat16


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
@every_backend
@pytest.mark.parametrize("method", ["dense", "qr", "sparse", "dhe"])
def test_weights_take_the_type_of_what_they_multiply(method: str, backend: str, weights: torch.dtype) -> None:
    case = next(case for case in CASES if case.method in (method, {"name": method, "form": "bitmap"}))
    for dtype in [torch.float32, torch.float64] if backend == "torch" else [torch.float32]:
        tables = made(case, backend, et.EmbeddingBagCollection, dtype)
        given = batch(4097, weights)
        wanted = expected(tables, given)
        for name, found in answers(tables, given).items():
            assert found.dtype == dtype
            np.testing.assert_allclose(found.detach().numpy(), wanted[name], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@every_backend
def test_the_default_type_changes_nothing(backend: str, default: torch.dtype) -> None:
    plan = et.plan(FEATURES, {"user": "lowrank", "items": "qr", "*": "dense"}, "0.5x", DIM)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            tables = et.EmbeddingBagCollection(plan, backend)
            tables.init(1.0, seed=3)
            vectors = tables(batch(4097)).values()
            vectors.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([vectors.detach(), *(value for value in tables.state_dict().values())])
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["fbgemm", "native"])
def test_fused_tables_refuse_other_types_in_a_line(backend: str, dtype: torch.dtype) -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "lowrank", "0.5x", DIM), backend)
    with pytest.raises(UserError, match=rf"the {backend} backend trains float32 tables, and cannot make them \w+;"):
        torch.nn.ModuleList([tables]).to(dtype)
    assert all(value.dtype != dtype for value in tables.state_dict().values())
    tables.float()(batch(4097))


@every_backend
@every_case
def test_no_rows_give_no_vectors_and_train_nothing(case: Case, backend: str) -> None:
    """B = 0, weighted or not, for every pooling; backward included."""
    for kind in (et.EmbeddingBagCollection, et.EmbeddingCollection):
        torch.manual_seed(0)
        tables = kind(case.plan(), backend, init_std=1.0)
        before = {name: value.clone() for name, value in tables.state_dict().items()}
        for weights in (None, torch.zeros(0)) if kind is et.EmbeddingBagCollection else (None,):
            nothing = torch.zeros(0, dtype=torch.int64)
            found = tables(KeyedJaggedTensor(NAMES, nothing, weights, lengths=nothing.int()))
            if kind is et.EmbeddingBagCollection:
                vectors = [found.values()]
                assert vectors[0].shape == (0, len(NAMES) * DIM)
            else:
                vectors = [found[name].values() for name in NAMES]
                assert {tuple(each.shape) for each in vectors} == {(0, DIM)}
                assert all(len(found[name].lengths()) == 0 for name in NAMES)
            assert {each.dtype for each in vectors} == {torch.float32}
            if any(each.requires_grad for each in vectors):
                torch.cat(vectors).sum().backward()
        assert all(torch.equal(tables.state_dict()[name], value) for name, value in before.items())


def divides(case: Case, width: int) -> bool:
    """Whether a method has vectors of a width."""
    try:
        case.plan(SOME, dim=width)
    except UserError:
        return False
    return True


SOME = [et.Feature("colour", 3), et.Feature("shop", 40, pooling="mean"), et.Feature("user", 300)]
WIDTHS = [
    pytest.param(case, width, id=f"{case.name}-{width}")
    for case in CASES
    for width in range(1, 10)
    if divides(case, width)
]


@pytest.mark.parametrize(("case", "width"), WIDTHS)
def test_backends_agree_for_every_width(case: Case, width: int) -> None:
    plan = case.plan(SOME, dim=width)
    torch.manual_seed(width)
    first = et.EmbeddingBagCollection(plan, "torch", init_std=1.0)
    random = np.random.default_rng(width)
    values = torch.from_numpy(np.concatenate([random.integers(0, f.num_ids, 20) for f in SOME]))
    lengths = torch.tensor([1, 0, 4, 15] * 3)
    given = KeyedJaggedTensor([f.name for f in SOME], values, torch.rand(60), lengths)
    for backend in ("fbgemm", "native"):
        other = et.EmbeddingBagCollection(plan, backend, et.Optimizer("sgd", 0.1), init_std=None)
        other.load_state_dict(first.state_dict())
        for some in (given, KeyedJaggedTensor(given.keys(), values, lengths=torch.ones(60).int())):
            torch.testing.assert_close(other(some).values(), first(some).values(), rtol=1e-5, atol=1e-5)


GOOD = {"keys": ["colour", "user"], "values": torch.tensor([1, 2, 3]), "lengths": torch.tensor([1, 0, 1, 1])}
IDS = torch.tensor([1, 2, 0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integers_of_any_width_are_ids(dtype: torch.dtype) -> None:
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("colour", 3), et.Feature("user", 9)]))
    given = [KeyedJaggedTensor(**{**GOOD, "values": IDS.to(kind)}) for kind in (dtype, torch.int64)]
    assert torch.equal(*(tables(each).values() for each in given))


@pooled
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": IDS.float()}, "ids are float32; they must be integers"),
        ({"values": IDS.double()}, "ids are float64; they must be integers"),
        ({"values": IDS.bool()}, "ids are bool; they must be integers"),
        ({"keys": ["colour", "user", "user"], "lengths": torch.tensor([1, 1, 1])}, "key 'user' stands twice"),
        ({"weights": torch.ones(2)}, "2 weights for 3 ids"),
        ({"weights": torch.ones(4)}, "4 weights for 3 ids"),
        ({"lengths": torch.tensor([1, 0, 1, 2])}, "bags of 4 ids together, and 3 ids"),
        ({"lengths": torch.tensor([1, 0, 1, 0])}, "bags of 2 ids together, and 3 ids"),
        ({"lengths": torch.tensor([1, 0, 3, -1])}, "feature 'user': bag 1 has the length -1"),
        ({"lengths": torch.tensor([1, 0, 1, 1, 0])}, "5 lengths of bags"),
        ({"lengths": None, "offsets": torch.tensor([0, 2, 1, 2, 3])}, "feature 'colour': bag 1 has the length -1"),
        ({"lengths": None, "offsets": torch.tensor([0, 1, 1, 2, 7])}, "bags of 7 ids together, and 3 ids"),
        ({"lengths": None, "offsets": torch.tensor([1, 1, 1, 2, 3])}, "bags of 2 ids together, and 3 ids"),
        (
            {"stride_per_key_per_rank": [[2], [2]], "inverse_indices": (["colour", "user"], torch.zeros(2, 2).long())},
            "different numbers of bags",
        ),
    ],
)
def test_batches_that_do_not_hold_together_are_refused_in_a_line(kind: type, changed: dict, message: str) -> None:
    tables = kind(et.plan([et.Feature("colour", 3), et.Feature("user", 9)]))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        tables(KeyedJaggedTensor(**{**GOOD, **changed}))
    assert "\n" not in str(raised.value)
