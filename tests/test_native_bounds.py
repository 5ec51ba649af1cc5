"""The native backend under any default dtype, and with inputs that lie: right, or refused in a line."""

from collections.abc import Iterator

import pytest
import torch
from laws import CASES, FEATURES, Case
from test_orders import batch, squares
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.lookup.base import Joined, Request
from embtab.lookup.make import make_lookup
from embtab.methods import Table

fused = pytest.mark.parametrize("backend", ["fbgemm", "native"])


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16])
def other_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def trained(case: Case, state: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """First vectors, and the state after two steps on weighted bags."""
    tables = et.EmbeddingBagCollection(case.plan(), "native", et.Optimizer("adagrad", 0.01), init_std=1.0)
    if state is not None:
        tables.load_state_dict(state, strict=False)
    vectors = tables(batch(0, weighted=False)).values()
    for seed in (0, 1):
        squares(tables, batch(seed)).float().backward()
    return vectors, tables.state_dict()


@pytest.mark.parametrize("name", ["dense", "qr product", "memcom"])
def test_the_default_dtype_changes_nothing(name: str, other_default: torch.dtype) -> None:
    (case,) = (case for case in CASES if case.name == name)
    torch.set_default_dtype(torch.float32)
    state = et.EmbeddingBagCollection(case.plan(), "native", init_std=1.0).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith(".optimizer")}
    vectors, after = trained(case, state)
    torch.set_default_dtype(other_default)
    found, other = trained(case, state)
    assert found.dtype == torch.float32
    assert torch.equal(found, vectors)
    for key, value in after.items():
        torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-2, msg=key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_count(dtype: torch.dtype) -> None:
    lookup = make_lookup([Table("t", 4, 8)], "native", "cpu", Optimizer("sgd", 1.0))
    lookup.table("t").fill_(1.0)
    weights = torch.tensor([1, 2, 4], dtype=dtype, requires_grad=True)
    (answer,) = lookup([Request(8, torch.tensor([0, 1, 2]), torch.tensor([1, 2]), weights)])
    assert answer[:, 0].tolist() == [1, 6]
    answer.sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == dtype
    assert weights.grad.tolist() == [8, 8, 8]
    assert lookup.table("t")[:, 0].tolist() == [0, -1, -3, 1]


@pytest.mark.parametrize("backend", ["torch", "fbgemm", "native"])
def test_weights_that_are_too_few_are_refused(backend: str) -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "dense"), backend)
    values = torch.zeros(5 * 1000, dtype=torch.int64)
    lengths = torch.full((5,), 1000)
    given = KeyedJaggedTensor([f.name for f in FEATURES], values, weights=torch.ones(2), lengths=lengths)
    with pytest.raises(UserError, match=r"2 weights for 5000 ids"):
        tables(given)


@fused
def test_a_lookup_reads_no_further_than_its_request(backend: str) -> None:
    lookup = make_lookup([Table("t", 4, 8)], backend, "cpu", None)
    rows, bags = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2])
    with pytest.raises(UserError, match=r"width 8: weights of shape \[2\] for 3 ids"):
        lookup([Request(8, rows, bags, torch.ones(2))])
    for wrong in ([1, 3], [1, 1], [4, -1], [2**62, 2**62]):
        with pytest.raises(UserError, match=r"width 8: lengths of bags .* there are 3 ids"):
            lookup([Request(8, rows, torch.tensor(wrong))])
    assert lookup([Request(8, rows, bags, torch.ones(3))])[0].shape == (2, 8)


def asked(rows: list[int], parts: int, joining: str) -> Request:
    ids = len(rows) // parts
    joined = Joined(joining, torch.tensor([0]), (ids, 1, 8 * (parts if joining == "concat" else 1)))
    return Request(8, torch.tensor(rows).view(parts, ids), None, joined=joined)


@pytest.mark.parametrize("row", [4, -1, 600, 2**31 - 1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("joining", ["concat", "sum", "product"])
@pytest.mark.parametrize("many", [1, 5000])
def test_rows_that_are_not_there_are_refused(row: int, joining: str, many: int) -> None:
    """Whatever computed them, wherever they stand, and before any is read."""
    lookup = make_lookup([Table("s", 1, 8), Table("t", 3, 8)], "native", "cpu", Optimizer())
    for at in (0, 2 * many - 1):
        rows = [3] * (2 * many)
        rows[at] = row
        with pytest.raises(UserError, match=rf"tables of width 8: row {row} was asked for.*4 rows together"):
            lookup([asked([3] * 6, 2, joining), asked(rows, 2, joining)])
    lookup([asked([3] * 2 * many, 2, joining)])[0].sum().backward()


@pytest.mark.parametrize("claimed", [600, 2**31 - 1])
def test_a_plan_that_claims_more_rows_than_there_are_is_refused(claimed: int) -> None:
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("user", 5000)], "hash", 300 * 4 * 16), "native")
    (block,) = tables.blocks
    (rows,) = {int(table.num_rows) for table in tables.plan.tables.values()}
    assert rows == 300
    block.get_buffer("arithmetic_")[..., 1] = claimed
    ids = KeyedJaggedTensor(["user"], torch.arange(5000), lengths=torch.ones(5000, dtype=torch.int64))
    with pytest.raises(UserError, match=r"tables of width 16: row \d+ was asked for, and they have 300 rows"):
        tables(ids)


def test_rows_are_computed_of_constants_that_can_be() -> None:
    lookup = make_lookup([Table("t", 4, 8)], "native", "cpu", Optimizer())
    ids, bases = torch.arange(4), torch.tensor([[0]])
    for arithmetic, constants in (("quotient", [0, 1, 1]), ("digit", [1, 0, 0]), ("digit", [-1, 1, 0])):
        with pytest.raises(UserError, match=f"divided by a constant below one .{arithmetic}"):
            lookup.placed_rows(arithmetic, ids, [4], bases, torch.tensor([[constants]]))
    with pytest.raises(UserError, match="9 ids together, and 4 ids"):
        lookup.placed_rows("id", ids, [9], bases, torch.zeros(1, 1, 3, dtype=torch.int64))
