"""torch.compile(fullgraph=True): collections in one graph give what they give without a compiler."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from laws import CASES, FEATURES, Case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.tables import opaque

BACKENDS = ["torch", "fbgemm", "native"]
NAMES = [feature.name for feature in FEATURES]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def batch_of(rows: int, longest: int = 4, weighted: bool = False, seed: int = 0) -> KeyedJaggedTensor:
    """Ids in range of the laws' features, keys not in plan order, some bags empty."""
    random = torch.Generator().manual_seed(seed)
    keys = NAMES[::-1]
    lengths = [torch.randint(0, longest + 1, (rows,), generator=random) for _ in keys]
    limits = {feature.name: feature.num_ids for feature in FEATURES}
    ids = [
        torch.randint(limits[key], (int(each.sum()),), generator=random)
        for key, each in zip(keys, lengths, strict=True)
    ]
    values = torch.cat(ids)
    weights = torch.rand(len(values), generator=random) if weighted else None
    return KeyedJaggedTensor(keys, values, weights, lengths=torch.cat(lengths))


def pair(method: object, backend: str) -> tuple[et.EmbeddingBagCollection, et.EmbeddingBagCollection]:
    """A collection, and another of the same values that is to be compiled."""
    budget = None if method == "dense" else "0.5x"
    plan = method.plan() if isinstance(method, Case) else et.plan(FEATURES, method, budget, 16)
    return tuple(made(plan, backend) for _ in range(2))  # type: ignore[return-value]


def made(plan: et.Plan, backend: str) -> et.EmbeddingBagCollection:
    optimizer = None if backend == "torch" else et.Optimizer("sgd", lr=0.5)
    tables = et.EmbeddingBagCollection(plan, backend, optimizer)
    tables.init(0.1, seed=1)
    return tables


def loss_of(tables: nn.Module) -> Callable[[KeyedJaggedTensor], Tensor]:
    """What is compiled: tables between other operations, so that they are a part of a graph."""
    return lambda batch: (tables(batch).values() * 2).tanh().square().sum()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Values and gradients, bit for bit; fused tables have no gradients."""
    state = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, state[name]), name
    gradients = {name: each.grad for name, each in other.named_parameters()}
    for name, each in one.named_parameters():
        there = gradients[name]
        assert (each.grad is None and there is None) or torch.equal(each.grad, there), name


# One operator stands for all in a graph: by default every method on one backend, and a few of all kinds on each.
KINDS = ("qr product", "cafe", "memcom", "dhe", "mixed")
WAYS = [("torch", "aot_eager"), ("torch", "eager"), ("fbgemm", "aot_eager"), ("native", "aot_eager")]
GRAPHS = [
    pytest.param(
        *(case, backend, compiler),
        marks=[] if case.name in KINDS or (backend, compiler) == WAYS[0] else pytest.mark.slow,
        id=f"{case.name}-{backend}-{compiler}",
    )
    for case in CASES
    for backend, compiler in WAYS
]


@pytest.mark.parametrize(("case", "backend", "compiler"), GRAPHS)
def test_one_graph_gives_the_vectors_and_gradients_of_none(case: Case, backend: str, compiler: str) -> None:
    torch.compiler.reset()
    plain, tables = pair(case, backend)
    compiled = torch.compile(loss_of(tables), backend=compiler, fullgraph=True, dynamic=True)
    for seed, (rows, longest) in enumerate([(5, 4), (7, 3)]):
        batch = batch_of(rows, longest, weighted=True, seed=seed)
        expected, found = loss_of(plain)(batch), compiled(batch)
        assert torch.equal(expected, found)
        expected.backward()
        found.backward()
        assert_same(plain, tables)


@every_backend
def test_batches_of_any_size_share_a_graph(backend: str) -> None:
    torch.compiler.reset()
    plain, tables = pair("qr", backend)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of(tables), backend=count, fullgraph=True)
    for rows in range(2, 22):
        assert torch.equal(compiled(batch_of(rows)), loss_of(plain)(batch_of(rows)))
    assert count.frame_count <= 2, "the second graph is that of any size"
    for rows in (0, 1):
        assert torch.equal(compiled(batch_of(rows)), loss_of(plain)(batch_of(rows)))
    assert count.frame_count <= 4


@every_backend
def test_two_calls_and_one_backward_are_those_of_no_graph(backend: str) -> None:
    torch.compiler.reset()
    plain, tables = pair("qr", backend)
    compiled = torch.compile(loss_of(tables), backend="aot_eager", fullgraph=True)
    for run, owner in ((loss_of(plain), plain), (compiled, tables)):
        (run(batch_of(4, seed=1)) * run(batch_of(4, seed=2)) + run(batch_of(4, seed=1))).backward()
        assert owner.training
    assert_same(plain, tables)


@every_backend
def test_weights_get_their_gradient_through_a_graph(backend: str) -> None:
    torch.compiler.reset()
    plain, tables = pair("qr", backend)
    compiled = torch.compile(loss_of(tables), backend="aot_eager", fullgraph=True)
    found = []
    for run in (loss_of(plain), compiled):
        batch = batch_of(6, weighted=True)
        batch.weights().requires_grad_()
        run(batch).backward()
        found.append(batch.weights().grad)
    assert torch.equal(*found)


@every_backend
def test_frozen_tables_and_evaluation_change_nothing_in_a_graph(backend: str) -> None:
    torch.compiler.reset()
    _, tables = pair("hash", backend)
    before = copy.deepcopy(tables.state_dict())
    compiled = torch.compile(loss_of(tables.requires_grad_(False)), backend="aot_eager", fullgraph=True)
    shift = torch.ones(1, requires_grad=True)
    (compiled(batch_of(4)) * shift).backward()
    with torch.no_grad():
        torch.compile(loss_of(tables.eval()), backend="aot_eager", fullgraph=True)(batch_of(4))
    assert all(torch.equal(value, tables.state_dict()[name]) for name, value in before.items())


def test_what_autograd_noted_goes_with_the_graph() -> None:
    torch.compiler.reset()
    gc.collect()
    _, tables = pair("qr", "torch")
    compiled, before = torch.compile(loss_of(tables), backend="aot_eager", fullgraph=True), len(opaque._noted)
    compiled(batch_of(4)).backward()
    for _ in range(3):
        compiled(batch_of(4))  # without a backward
    gc.collect()
    assert len(opaque._noted) == before


def test_a_copy_is_compiled_for_itself() -> None:
    torch.compiler.reset()
    _, tables = pair("hash", "torch")
    other = copy.deepcopy(tables)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    run = [torch.compile(loss_of(each), backend="aot_eager", fullgraph=True)(batch_of(4)) for each in (tables, other)]
    assert float(run[0].detach()) > 0
    assert float(run[1].detach()) == 0


def test_mistakes_in_a_graph_are_lines() -> None:
    torch.compiler.reset()
    _, tables = pair("dense", "torch")
    compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)
    compiled(batch_of(3))
    wrong = batch_of(3)
    wrong.values()[0] = 10_000
    with pytest.raises(UserError, match=r"feature 'user' \(table 'user'\): id 10000 at position 0"):
        compiled(wrong)


def test_a_vector_per_id_breaks_the_graph_and_says_so() -> None:
    torch.compiler.reset()
    plan = et.plan(FEATURES, "hash", "0.5x", 16)
    tables = et.EmbeddingCollection(plan, "torch")
    with pytest.raises(RuntimeError, match="depends on the batch; leave fullgraph=True out"):
        torch.compile(tables, backend="eager", fullgraph=True)(batch_of(3))
    found = torch.compile(tables, backend="eager")(batch_of(3))
    assert all(torch.equal(each.values(), found[name].values()) for name, each in tables(batch_of(3)).items())


@pytest.mark.slow  # a C++ compiler runs
@every_backend
def test_inductor_gives_the_vectors_and_gradients_of_no_graph(backend: str) -> None:
    torch.compiler.reset()
    plain, tables = pair("unified", backend)
    compiled = torch.compile(loss_of(tables), fullgraph=True)
    for rows in (5, 8, 3):
        expected, found = loss_of(plain)(batch_of(rows)), compiled(batch_of(rows))
        assert torch.allclose(expected, found, rtol=1e-6)
        expected.backward()
        found.backward()
    for name, value in plain.state_dict().items():
        assert torch.allclose(value.float(), tables.state_dict()[name].float(), atol=1e-6), name
