"""The native loop over every shape that its code tells apart, on one thread and on two: torch's sums and gradients."""

from itertools import product

import pytest
import torch
from test_native import vectors

from embtab.errors import UserError
from embtab.fused import OPTIMIZERS, FusedOptimizer, Optimizer
from embtab.lookup import native_loop
from embtab.lookup.base import Joined, Request
from embtab.lookup.native import NativeLookup
from embtab.methods import Table
from embtab.methods.base import JOININGS

LR, FEATURES, COLUMNS = 0.1, 2, 3  # the column between the features is not this request's


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(native_loop, "WORTH_A_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: request.param)
    return int(request.param)


def lookup(rows: int, width: int, name: str = "sgd", max_gradient: float | None = None) -> NativeLookup:
    optimizer = Optimizer(name, LR, max_gradient=max_gradient)
    made = NativeLookup([Table("t", rows, width)], FusedOptimizer(optimizer))
    made.table("t").copy_(torch.linspace(-1, 1, rows * width).view(rows, width))
    return made


def asked(rows: int, width: int, joining: str, bags: int, longest: int | None, weighted: bool) -> Request:
    """Ids drawn at random; bags of 0 to `longest` of them, or without an end where there is one id each."""
    drawn = torch.Generator().manual_seed(bags)
    count = FEATURES * bags
    lengths = None if longest is None else torch.randint(0, longest + 1, (count,), generator=drawn)
    ids = count if lengths is None else int(lengths.sum())
    weights = torch.randn(ids, generator=drawn).requires_grad_() if weighted else None
    parts = 2
    target = (bags, COLUMNS, width * (parts if joining == "concat" else 1))
    joined = Joined(joining, torch.tensor([2, 0]), target)
    return Request(width, torch.randint(0, rows, (parts, ids), generator=drawn), lengths, weights, joined=joined)


def check_close(found: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    message = f"{case}: {{}}"
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4, msg=message.format)


@pytest.mark.parametrize("joining", JOININGS)
@pytest.mark.parametrize("width", [*range(1, 10), 16])
def test_any_shape_is_torchs(width: int, joining: str, threads: int) -> None:
    for rows, bags, longest, weighted in product((1, 7, 300), (0, 1, 40), (None, 0, 5), (False, True)):
        case = f"{rows} rows, {bags} bags of {longest}, weighted {weighted}"
        made, request = lookup(rows, width), asked(rows, width, joining, bags, longest, weighted)
        table = made.table("t").double().requires_grad_()
        own = [table] if request.weights is None else [table, request.weights]
        (answer,) = made([request])
        expected = vectors(table, request)
        factors = {column: torch.linspace(-1, 1, vector.numel()).view_as(vector) for column, vector in expected.items()}
        sum((answer[:, column] * factors[column]).sum() for column in expected).backward()
        found = [made.table("t"), *([] if request.weights is None else [request.weights.grad])]
        loss = sum((vector * factors[column]).sum() for column, vector in expected.items())
        of_table, *of_weights = torch.autograd.grad(loss + 0 * table.sum(), own, materialize_grads=True)
        for column, vector in expected.items():
            check_close(answer[:, column], vector, case)
        for one, other in zip(found, [table - LR * of_table, *of_weights], strict=True):
            check_close(one, other, case)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("width", [1, 3, 8, 9])
def test_a_step_of_any_optimizer_leaves_other_rows_alone(width: int, name: str, threads: int) -> None:
    for rows in (50, 5000):  # with a sum for each row, and for those that occur
        made = lookup(rows, width, name)
        before = made.table("t").clone()
        ids = torch.arange(0, 40, 2).repeat(3)
        made([Request(width, ids, None)])[0].sum().backward()
        changed = (made.table("t") != before).all(dim=1)
        assert changed.nonzero().flatten().tolist() == list(range(0, 40, 2))
        assert torch.equal(made.table("t")[~changed], before[~changed])


@pytest.mark.parametrize("rows", [4, 5000])
@pytest.mark.parametrize("joining", JOININGS)
def test_what_reaches_a_row_is_clamped_before_it_is_added_up(joining: str, rows: int, threads: int) -> None:
    made = lookup(rows, 9, "sgd", max_gradient=0.5)
    made.table("t").fill_(1.0)
    ids = torch.tensor([[0, 1, 1], [2, 3, 3]])
    joined = Joined(joining, torch.tensor([0]), (3, 1, 18 if joining == "concat" else 9))
    (3 * made([Request(9, ids, None, joined=joined)])[0]).sum().backward()
    expected = torch.tensor([0.95, 0.9, 0.95, 0.9])
    torch.testing.assert_close(made.table("t")[:4], expected.unsqueeze(1).expand(4, 9))


@pytest.mark.parametrize("joining", JOININGS)
@pytest.mark.parametrize("row", [7, -1, 2**32, 2**63 - 1])
def test_rows_that_are_not_there_are_refused_whoever_meets_them(row: int, joining: str, threads: int) -> None:
    for longest, at in product((None, 5), (0, -1)):
        made, request = lookup(7, 9, "adagrad"), asked(7, 9, joining, 40, longest, weighted=True)
        before = made.table("t").clone()
        request.rows[1, at] = row
        with pytest.raises(UserError, match=rf"row {row} was asked for, and they have 7 rows"):
            made([request])
        assert torch.equal(made.table("t"), before)
