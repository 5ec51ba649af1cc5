"""The native backend against NumPy, bit by bit, and against plain torch; with any number of threads; and its errors."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CASES, FEATURES, Bags, Case, single_ids
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab import compiler
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS, FusedOptimizer, Optimizer
from embtab.lookup import native, native_loop
from embtab.lookup.base import Joined, Request
from embtab.lookup.native import NativeLookup
from embtab.lookup.torch import TorchLookup
from embtab.methods import Table
from embtab.methods.base import ARITHMETICS, JOININGS

ROWS, LR, EPS = 9, np.float32(0.1), np.float32(1e-8)


@st.composite
def requests(draw: st.DrawFn, width: int) -> Request:
    """Rows in bags; or K rows an id of some features, joined, in places of a wider answer."""
    features, bags = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    parts = draw(st.integers(1, 3))
    lengths = draw(st.none() | st.lists(st.integers(0, 3), min_size=features * bags, max_size=features * bags))
    total = features * bags if lengths is None else sum(lengths)
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=parts * total, max_size=parts * total))
    weights = draw(st.none() | st.lists(st.floats(-2, 2, width=16), min_size=total, max_size=total))
    joining = draw(st.sampled_from(JOININGS))
    across = features + draw(st.integers(0, 1))
    columns = torch.tensor(draw(st.permutations(range(across)))[:features])
    target = (bags, across, width * (parts if joining == "concat" else 1))
    return Request(
        width,
        torch.tensor(rows, dtype=torch.int64).view(parts, total),
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        None if weights is None else torch.tensor(weights, dtype=torch.float32).requires_grad_(),
        joined=Joined(joining, columns, target),
    )


def vectors(table: torch.Tensor, request: Request) -> dict[int, torch.Tensor]:
    """The sums [B, V] of each feature, by column, from the definition."""
    assert request.joined is not None
    each = table[request.rows]
    if request.joined.joining == "concat":
        made = torch.cat(tuple(each), dim=-1)
    else:
        made = each.sum(0) if request.joined.joining == "sum" else each.prod(0)
    if request.weights is not None:
        made = made * request.weights.to(made.dtype).unsqueeze(-1)
    lengths = torch.ones(made.shape[0], dtype=torch.int64) if request.lengths is None else request.lengths
    bags = [part.sum(0) for part in made.split(lengths.tolist())]
    stride = request.joined.target[0]
    empty = made.new_zeros(0, made.shape[-1])
    return {
        int(column): torch.stack(bags[i * stride : (i + 1) * stride]) if stride else empty
        for i, column in enumerate(request.joined.columns)
    }


def lookup(optimizer: str, width: int, rows: int = ROWS) -> NativeLookup:
    made = NativeLookup([Table("t", rows, width)], FusedOptimizer(Optimizer(optimizer, float(LR))))
    made.table("t").copy_(torch.linspace(-1, 1, rows * width).view(rows, width))
    return made


@settings(max_examples=300, deadline=None)
@given(data=st.data(), width=st.sampled_from([1, 4, 6, 8, 16, 19]), name=st.sampled_from(OPTIMIZERS))
def test_vectors_weights_and_updates_are_those_of_the_definition(data, width: int, name: str) -> None:
    asked = data.draw(st.lists(requests(width), min_size=1, max_size=3))
    made = lookup(name, width)
    table = made.table("t").double().clone().requires_grad_()
    random, loss, expected = np.random.default_rng(0), torch.zeros(()), 0 * table.sum()
    for request, answer in zip(asked, made(asked), strict=True):
        assert request.joined is not None
        assert answer.shape == request.joined.target
        for column, sums in vectors(table, request).items():
            torch.testing.assert_close(answer[:, column].detach().double(), sums.detach(), rtol=1e-5, atol=1e-6)
            factor = torch.from_numpy(random.standard_normal(sums.shape).astype(np.float32))
            loss, expected = loss + (answer[:, column] * factor).sum(), expected + (sums * factor).sum()
    loss.backward()
    weighted = [request.weights for request in asked if request.weights is not None and len(request.weights)]
    mine = [weights.grad for weights in weighted]
    for weights in weighted:
        weights.grad = None
    expected.backward()
    theirs = [weights.grad for weights in weighted]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert table.grad is not None
    gradient = table.grad.numpy()
    squares = gradient**2 if name == "adagrad" else (gradient**2).mean(1, keepdims=True)
    rate = 1.0 if name == "sgd" else 1 / (np.sqrt(squares) + EPS)
    after = table.detach().numpy() - LR * rate * gradient
    clear = np.abs(gradient).max(1) > 1e-4  # Adagrad makes a whole step of what is left where gradients cancel
    clear |= (gradient == 0).all(1) | (name == "sgd")
    if name == "adagrad":
        clear &= ((np.abs(gradient) > 1e-4) | (gradient == 0)).all(1)
    np.testing.assert_allclose(made.table("t").numpy()[clear], after[clear], rtol=1e-3, atol=1e-4)


def row_of(arithmetic: str, id_: int, c: list[int]) -> int:
    """By Python's whole numbers, which have no end."""
    if arithmetic == "hash":
        x = (id_ + c[0]) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x >> 33) * c[1] >> 31
    if arithmetic == "id":
        return id_
    return id_ // c[0] * c[1] + id_ * c[2] if arithmetic == "quotient" else id_ // c[0] % c[1]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), arithmetic=st.sampled_from(ARITHMETICS))
def test_rows_are_those_of_whole_numbers(data, arithmetic: str) -> None:
    sizes, parts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)), data.draw(st.integers(1, 3))
    anything, positive = st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**31 - 1)
    an_id = anything if arithmetic == "hash" else st.integers(0, 2**62)
    ids = data.draw(st.lists(an_id, min_size=sum(sizes), max_size=sum(sizes)))
    collisions = data.draw(st.integers(1, 2**62))
    constant = {
        "id": st.just([0, 0, 0]),
        "hash": st.tuples(anything, positive, st.just(0)).map(list),
        "quotient": st.sampled_from([[collisions, 1, 0], [collisions, -collisions, 1]]),
        "digit": st.tuples(st.integers(1, 2**62), positive, st.just(0)).map(list),
    }[arithmetic]
    constants = [[data.draw(constant) for _ in range(parts)] for _ in sizes]
    bases = [[data.draw(st.integers(0, 2**40)) for _ in range(parts)] for _ in sizes]
    features = [f for f, size in enumerate(sizes) for _ in range(size)]
    wanted = [
        [row_of(arithmetic, id_, constants[f][k]) + bases[f][k] for id_, f in zip(ids, features, strict=True)]
        for k in range(parts)
    ]
    tensors = (torch.tensor(numbers, dtype=torch.int64) for numbers in (ids, bases, constants))
    found = lookup("sgd", 8).placed_rows(arithmetic, next(tensors), sizes, *tensors)
    assert found.tolist() == wanted


@pytest.mark.parametrize("arithmetic", ["quotient", "digit"])
def test_quotients_are_exact_on_both_sides_of_2_to_the_32(arithmetic: str) -> None:
    """Below it they are products with a reciprocal: ids just around multiples of divisors of every kind."""
    top = 2**32 - 1
    divisors = [1, 2, 3, 7, 641, 6700417, 2**16, 2**31 - 1, 2**31, 2**31 + 1, top - 1, top, top + 1, 2**40]
    for divisor in divisors:
        near = {k * divisor + off for k in (0, 1, 2, 3, top // divisor, top // divisor - 1) for off in (-1, 0, 1)}
        below = sorted({id_ for id_ in near | {0, 1, top - 1, top} if 0 <= id_ <= top})
        for ids in (below, [*below, top + 1, 2**62]):
            constants = [divisor, -divisor, 1] if arithmetic == "quotient" else [divisor, 97, 0]
            wanted = [row_of(arithmetic, id_, constants) for id_ in ids]
            given = (torch.tensor(numbers, dtype=torch.int64) for numbers in ([[0]], [[constants]]))
            found = lookup("sgd", 8).placed_rows(arithmetic, torch.tensor(ids), [len(ids)], *given)
            assert found.tolist() == [wanted], divisor


def numpy_step(name: str, table: np.ndarray, moments: np.ndarray, row: int, gradient: np.ndarray) -> None:
    """One step in float32, every operation rounded, squares added up in eight lanes and those in pairs."""
    if name == "sgd":
        table[row] += -LR * gradient
    elif name == "adagrad":
        moments[row] += gradient * gradient
        table[row] -= LR * gradient / (np.sqrt(moments[row]) + EPS)
    else:
        lanes = np.zeros(8, np.float32)
        for start in range(0, len(gradient), 8):
            part = gradient[start : start + 8]
            lanes[: len(part)] += part * part
        fours = lanes[:4] + lanes[4:]
        moments[row] += ((fours[0] + fours[1]) + (fours[2] + fours[3])) / np.float32(len(gradient))
        table[row] += -LR / (np.sqrt(moments[row]) + EPS) * gradient


@pytest.mark.parametrize("count", [ROWS, 500], ids=["sums of all rows", "sums of those that occur"])
@pytest.mark.parametrize("width", [5, 8, 16, 64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_numpy_bit_by_bit(name: str, width: int, count: int) -> None:
    """Gradients are summed up in the order of the samples, feature after feature."""
    features, bags = 3, 50
    random = np.random.default_rng(1)
    made = lookup(name, width, count)
    table, moments = made.table("t").numpy().copy(), np.zeros((count, width if name == "adagrad" else 1), np.float32)
    for _ in range(3):
        rows = random.integers(0, count, (features, bags))
        gradient = random.standard_normal((bags, features, width)).astype(np.float32)
        joined = Joined("concat", torch.arange(features), (bags, features, width))
        (answer,) = made([Request(width, torch.from_numpy(rows).view(1, -1), None, joined=joined)])
        np.testing.assert_array_equal(answer.detach().numpy(), table[rows.T])
        answer.backward(torch.from_numpy(gradient))
        sums = np.zeros((count, width), np.float32)
        for feature in range(features):
            for bag in range(bags):
                sums[rows[feature, bag]] += gradient[bag, feature]
        for row in np.unique(rows):
            numpy_step(name, table, moments, row, sums[row])
        np.testing.assert_array_equal(made.table("t").numpy(), table)


@pytest.mark.parametrize(("ids", "bags", "alone"), [(2, 4, False), (20, 4, True), (2, 20, True)])
def test_places_that_need_more_bits_are_one_threads(
    ids: int, bags: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads note rows and pieces of the gradient in 32 bits; here as if there were 4."""
    monkeypatch.setattr(native_loop, "MAX_NOTED", 2**4)
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("f", 9)], dim=4), "native", et.Optimizer("sgd", lr=0.1))
    lengths = torch.tensor([ids, *[0] * (bags - 1)])
    answer = tables(KeyedJaggedTensor(["f"], torch.arange(ids) % 9, lengths=lengths)).values()
    asked: list[int] = []
    monkeypatch.setattr(native_loop, "_threads", lambda numbers: asked.append(numbers) or 1)
    answer.sum().backward()
    assert bool(asked) is not alone


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_change_no_bit(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_loop, "WORTH_A_THREAD", 1)
    states = []
    for threads in (1, 3):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(0)
        tables = et.EmbeddingBagCollection(case.plan(), "native", et.Optimizer(name, lr=0.1), init_std=1.0)
        random = np.random.default_rng(0)
        for _ in range(3):
            content = {
                f.name: [[(int(i), 0.5) for i in random.integers(0, f.num_ids, n)] for n in (2, 0, 40, 3)]
                for f in FEATURES
            }
            tables(Bags(content).kjt(weighted=True)).values().square().sum().backward()
        states.append(tables.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("rows", [50_000, 500_000])
def test_many_rows_come_out_once(rows: int) -> None:
    """More than an update has had room for, against torch's SGD."""
    width, count = 16, 120_000
    asked = Request(width, torch.randint(rows, (count,), generator=torch.Generator().manual_seed(0)), None)
    made = NativeLookup([Table("t", rows, width)], FusedOptimizer(Optimizer("sgd", lr=0.5)))
    other = TorchLookup([Table("t", rows, width)], "cpu")
    gradient = torch.randint(-4, 5, (count, width), generator=torch.Generator().manual_seed(1)).float()  # exact sums
    made([asked])[0].backward(gradient)
    other([asked])[0].backward(gradient)
    (parameter,) = other.parameters()
    assert parameter.grad is not None
    assert torch.equal(made.table("t"), -0.5 * parameter.grad)


def test_a_copy_trains_alone_and_training_goes_on_from_a_state_dict() -> None:
    plan = et.plan(FEATURES, "unified", "0.5x", dim=8)
    ids = single_ids({f.name: np.arange(40) % f.num_ids for f in FEATURES})

    def trained(tables: et.EmbeddingBagCollection) -> et.EmbeddingBagCollection:
        tables(ids).values().square().sum().backward()
        return tables

    first = trained(et.EmbeddingBagCollection(plan, "native", init_std=1.0))
    before = {key: value.clone() for key, value in first.state_dict().items()}
    second = trained(copy.deepcopy(first))
    for key, value in first.state_dict().items():
        assert torch.equal(value, before[key]), key
    resumed = et.EmbeddingBagCollection(plan, "native")
    resumed.load_state_dict(before)
    for key, value in trained(resumed).state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    fbgemm = et.EmbeddingBagCollection(plan, "fbgemm")
    fbgemm.load_state_dict(before)
    for key, value in trained(fbgemm).state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = et.plan(FEATURES, "dense", dim=8)
    with pytest.raises(UserError, match=r"native backend trains on CPUs.*'meta'.*fbgemm"):
        et.EmbeddingBagCollection(plan, "native", device="meta")
    with pytest.raises(UserError, match=r"native backend trains on CPUs.*'meta'"):
        et.EmbeddingBagCollection(plan, "native").to("meta")
    with pytest.raises(UserError, match=r"fewer than 2\^32 rows"):
        NativeLookup([Table("t", 2**32, 4)], FusedOptimizer(Optimizer()))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"native backend: there is no C\+\+ compiler 'no-such-compiler'.*CXX"):
        compiler.build(Path(native.__file__).with_name("native.cpp"), "the native backend")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("this is no program\n")
    with pytest.raises(UserError, match=r"a test could not be built.*wrong\.cpp.*error"):
        compiler.build(wrong, "a test")
    assert not (tmp_path / "embtab").exists()  # nothing half made


STEP = """
import os
import torch
from embtab.lookup import native_loop
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import Request
from embtab.methods import Table
from embtab.lookup.native import NativeLookup

torch.set_num_threads(2)
native_loop.WORTH_A_THREAD = 1
lookup = NativeLookup([Table("t", 9, 8)], FusedOptimizer(Optimizer("sgd", 1.0)))


def step():
    lookup([Request(8, torch.arange(9), None)])[0].sum().backward()
    return lookup.table("t").sum().item()


"""


def test_a_process_that_was_forked_trains_on() -> None:
    """Threads do not come along; nobody waits for them."""
    fork = "step()\nchild = os.fork()\nif not child:\n    os._exit(0 if step() == -144 else 3)\n"
    fork += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), step())\n"
    done = subprocess.run([sys.executable, "-c", STEP + fork], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "-144.0"], done.stderr


def test_a_compiler_without_openmp_makes_one_thread_and_a_warning(tmp_path: Path) -> None:
    other = tmp_path / "g++"
    other.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) echo none >&2; exit 1;; esac\nexec g++ "$@" -O0\n')
    other.chmod(0o755)
    environment = os.environ | {"CXX": str(other), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", STEP + "print(step())"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.stdout.split() == ["-72.0"], done.stderr
    assert "the native backend runs in one thread, for it could not be built with OpenMP" in done.stderr


def test_processes_that_build_at_the_same_time_share_one_library(tmp_path: Path) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    library = f"build(Path({str(source)!r}), 'a test')"
    ask = f"from pathlib import Path; from embtab.compiler import build; print({library}.answer())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    running = [
        subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42"] * 3
    assert len(list((tmp_path / "embtab").iterdir())) == 1
