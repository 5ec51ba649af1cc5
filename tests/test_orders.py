"""Gradients in every order of forward and backward: against torch's autograd and optimizers on the torch backend."""

import gc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from laws import CASES, FEATURES, Bags, Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS

LR = 0.01  # small, because products of parts diverge soon
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
some_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("qr product", "partitions", "hash")], ids=lambda case: case.name
)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def batch(seed: int, weighted: bool = True) -> KeyedJaggedTensor:
    """Bags of 2, 0 and 3 ids; batches of different seeds share some."""
    random = np.random.default_rng(seed)
    content = {
        f.name: [[(int(i), random.random()) for i in random.integers(0, min(f.num_ids, 30), n)] for n in (2, 0, 3)]
        for f in FEATURES
    }
    made = Bags(content).kjt(weighted)
    if weighted:
        made.weights().requires_grad_()
    return made


def stepper(module: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}
    kwargs = {} if name == "sgd" else {"eps": 1e-8}
    return kinds[name](module.parameters(), lr=LR, **kwargs)


class Pair:
    """The same tables twice: with an optimizer of their own, and as parameters of torch."""

    def __init__(self, case: Case, backend: str, name: str) -> None:
        self.plain = et.EmbeddingBagCollection(case.plan(), "torch", init_std=1.0)
        optimizer = None if backend == "torch" else et.Optimizer(name, lr=LR)
        self.fused = et.EmbeddingBagCollection(case.plan(), backend, optimizer)
        self.fused.load_state_dict(self.plain.state_dict())
        self.optimizer = stepper(self.plain.lookup, name)
        self.outer = stepper(self.fused.lookup, name) if backend == "torch" else None

    def gradients(self, loss: Callable[[et.EmbeddingBagCollection], Tensor]) -> list[Tensor]:
        """Of the tables as parameters."""
        return list(torch.autograd.grad(loss(self.plain), list(self.plain.lookup.parameters())))

    def step(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.plain.lookup.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def compare(self) -> None:
        for key, value in self.plain.lookup.named_state().items():
            found = self.fused.lookup.named_state()[key]
            torch.testing.assert_close(found, value, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def squares(tables: et.EmbeddingBagCollection, *batches: KeyedJaggedTensor) -> Tensor:
    return sum((tables(each).values().square().sum() for each in batches), torch.zeros(()))


@pytest.mark.parametrize(
    ("backend", "name"), [("torch", "sgd"), ("fbgemm", "sgd"), *(("native", name) for name in OPTIMIZERS)]
)
@every_case
def test_two_calls_and_one_backward_are_one_step_of_torch(case: Case, backend: str, name: str) -> None:
    """Two towers on one collection: a^2 + b^2; tables, and the gradients of bag weights."""
    pair = Pair(case, backend, name)
    for seed in (0, 2):
        mine, theirs = ([batch(seed), batch(seed + 1)] for _ in range(2))
        squares(pair.fused, *mine).backward()
        if pair.outer is not None:
            pair.outer.step()
            pair.outer.zero_grad()
        squares(pair.plain, *theirs).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.weights().grad, other.weights().grad, rtol=1e-4, atol=1e-4)
    pair.compare()


@every_optimizer
def test_fbgemm_makes_a_step_of_every_call(name: str) -> None:
    """Known of its kernel, and said in the docstring: the call that comes last steps first."""
    pair = Pair(CASES[0], "fbgemm", name)
    squares(pair.fused, batch(0), batch(1)).backward()
    first, second = (pair.gradients(lambda tables, seed=seed: squares(tables, batch(seed))) for seed in (1, 0))
    pair.step(first)
    pair.step(second)
    pair.compare()


@every_optimizer
@some_cases
def test_backward_after_backward_is_by_the_rows_of_forward(case: Case, name: str) -> None:
    pair = Pair(case, "native", name)
    for loss in [squares(pair.fused, batch(seed)) for seed in (0, 1)]:
        loss.backward()
    gradients = [pair.gradients(lambda tables, seed=seed: squares(tables, batch(seed))) for seed in (0, 1)]
    for each in gradients:
        pair.step(each)
    pair.compare()


@some_cases
@pytest.mark.parametrize("backend", ["fbgemm", "native"])
def test_weights_gradients_are_by_the_rows_of_forward(case: Case, backend: str) -> None:
    pair = Pair(case, backend, "sgd")
    mine, theirs = ([batch(0), batch(1)] for _ in range(2))
    for loss in [squares(pair.fused, each) for each in mine]:
        loss.backward()
    for each in theirs:
        squares(pair.plain, each).backward()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.weights().grad, other.weights().grad, rtol=1e-4, atol=1e-4)


@every_optimizer
@some_cases
def test_a_graph_that_is_kept_gives_the_same_gradient_again(case: Case, name: str) -> None:
    pair = Pair(case, "native", name)
    loss = squares(pair.fused, batch(0))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    gradients = pair.gradients(lambda tables: squares(tables, batch(0)))
    for _ in range(3):
        pair.step(gradients)
    pair.compare()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@every_optimizer
@some_cases
def test_checkpoints_change_nothing(case: Case, name: str, reentrant: bool) -> None:
    """Backward computes parts of forward anew: in the middle of a pass, whose step must wait for its end."""
    pair = Pair(case, "native", name)
    on = torch.ones((), requires_grad=True)  # without an input that has a gradient a checkpoint gives none

    def tower(seed: int) -> Callable[[Tensor], Tensor]:
        return lambda on: on * squares(pair.fused, batch(seed))

    def nested(on: Tensor) -> Tensor:
        return checkpoint(tower(1), on, use_reentrant=reentrant) + tower(2)(on)

    loss = checkpoint(tower(0), on, use_reentrant=reentrant) + checkpoint(nested, on, use_reentrant=reentrant)
    loss.backward()
    pair.step(pair.gradients(lambda tables: squares(tables, batch(0), batch(1), batch(2))))
    pair.compare()


class Failing(torch.autograd.Function):
    """Passes numbers on, and fails in backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


@some_cases
def test_an_error_in_backward_leaves_nothing_behind(case: Case) -> None:
    pair = Pair(case, "native", "sgd")
    before = {key: value.clone() for key, value in pair.fused.state_dict().items()}
    other = Pair(CASES[0], "native", "sgd").fused
    # The failing part comes first, so that its backward is the last: gradients of the other have arrived by then.
    loss = Failing.apply(squares(other, batch(3))) + squares(pair.fused, batch(0))
    with pytest.raises(ArithmeticError, match="in backward"):
        loss.backward()
    del loss
    gc.collect()
    for key, value in pair.fused.state_dict().items():
        assert torch.equal(value, before[key])
    squares(pair.fused, batch(1)).backward()
    pair.step(pair.gradients(lambda tables: squares(tables, batch(1))))
    pair.compare()


@some_cases
def test_gradients_of_weights_alone_train_no_table(case: Case) -> None:
    pair = Pair(case, "native", "sgd")
    mine, theirs = batch(0), batch(0)
    (found,) = torch.autograd.grad(squares(pair.fused, mine), mine.weights())
    (wanted,) = torch.autograd.grad(squares(pair.plain, theirs), theirs.weights())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    pair.compare()


def test_what_was_written_to_between_forward_and_backward_is_refused() -> None:
    (case,) = (case for case in CASES if case.name == "qr product")
    pair = Pair(case, "native", "sgd")
    loss = squares(pair.fused, batch(0))
    pair.fused.load_state_dict(pair.plain.state_dict())
    with pytest.raises(UserError, match=r"tables of width 16 were written to between forward and backward"):
        loss.backward()
    weighted = batch(0)
    loss = squares(pair.fused, weighted)
    with torch.no_grad():
        weighted.weights().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reads_that_no_backward_needs_keep_no_rows() -> None:
    """One forward and one backward, however long losses are kept: nothing is copied."""
    (case,) = (case for case in CASES if case.name == "qr product")
    pair = Pair(case, "native", "sgd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embtab.lookup.native_loop.Read.save", lambda *_: pytest.fail("rows were copied"))
        losses = []
        for seed in range(3):
            losses.append(squares(pair.fused, batch(seed, weighted=False)))
            losses[-1].backward()
            with torch.no_grad():
                losses.append(squares(pair.fused, batch(seed)))
