"""Lookup backends: they hold the physical tables, sum rows over bags, and know nothing of methods.

    rows [N], lengths [B] --lookup--> sums [B, W]

    N rows to read   B bags   W width of the table   R rows of all tables of one width

But for the last of them tables of one width are stacked into one matrix, and a method's rows are already offset
by `base`. One call then serves every table of that width, whatever the number of bags, and a batch of any shape is one
kernel launch a width. (Measured for 26 tables of 100k rows x 16, batch 4096, uniform ids, one thread: forward, backward
and update take 0.62 of the time of the same kernel with 26 separate tables; two chunks of width 8 in one table 0.57.)
Further backends are in `embtab.fbgemm`, `embtab.native` and, where tables are spread over processes,
`embtab.sharding.lookup`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.drawing import Draw
from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.methods import Encoding, Table
from embtab.methods.base import LiveTable
from embtab.quantise import served
from embtab.state import NamedState, Place, at, planted


@dataclass(frozen=True)
class Joined:
    """How the K rows of each id of F features become vectors of V numbers, and where their sums over bags belong.

    Args:
        joining: see `JOININGS`.
        columns: int64 [F], of the features among those of a sample. Bags come feature after feature.
        target: [B, C, V], the shape of an answer with a vector for each column. Requests with one and the same tuple
            fill one answer together; each of them is given all of it.
    """

    joining: str
    columns: Tensor
    target: tuple[int, int, int]


@dataclass
class Request:
    """Rows of tables of one width, to be summed over bags.

    Args:
        width: W.
        rows: int64 [N], offset by the tables' `base`, slot after slot.
        lengths: int64 [B], rows in each bag, equally many bags a slot; None where every row is a bag of its own.
        weights: float32 [N] factors of the rows, or None.
        slots: who asks: one name per feature and part, see `slot`. Only a backend that shards tables needs them.
        sizes: rows of each slot.
        joined: only for a lookup that `joins`: how rows [K, N] become vectors.
    """

    width: int
    rows: Tensor
    lengths: Tensor | None
    weights: Tensor | None = None
    slots: Sequence[str] = ()
    sizes: Sequence[int] = ()
    joined: Joined | None = None


def slot(feature: str, part: int) -> str:
    """The name of a feature's k-th part: always the same table, read by always the same feature."""
    return f"{feature}@{part}"


class Lookup(NamedState):
    """The physical tables. `state_dict` names them one by one, the same in every backend.

    Attributes:
        base: what to add to a row of a table, by the table's name.
        fused: the optimizer applied inside backward; None where the tables' optimizer is outside.
        spread: whether the tables are spread over processes, which train them together.
        joins: whether the lookup makes vectors of several rows itself, and rows of ids by `placed_rows`.
    """

    joins: ClassVar[bool] = False
    spread: ClassVar[bool] = False

    def __init__(self, tables: Sequence[Table], fused: FusedOptimizer | None = None) -> None:
        super().__init__()
        self.tables = {table.name: table for table in tables}
        self.base = dict.fromkeys(self.tables, 0)
        self.fused = fused

    @property
    def optimizer(self) -> Optimizer:
        """The numbers of the fused optimizer as they are now.

        Raises:
            UserError: where the optimizer is outside.
        """
        if self.fused is None:
            raise UserError("the torch backend has no optimizer of its own; set the learning rate of yours")
        return self.fused.settings

    @abstractmethod
    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers each request with its sums [B, W]."""

    def placed_rows(
        self, arithmetic: str, ids: Tensor, sizes: Sequence[int], bases: Tensor, constants: Tensor
    ) -> Tensor:
        """int64 [K, N]: the rows of ids in the lookup's matrices; only for one that `joins`.

        Args:
            arithmetic: one of `ARITHMETICS`.
            ids: int64 [N], feature after feature; where they are divided not below zero.
            sizes: how many ids each of the F features has.
            bases: int64 [F, K], what is added to the rows of each part.
            constants: int64 [F, K, 3], c0 to c2.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute rows")

    @abstractmethod
    def table(self, name: str) -> Tensor:
        """The matrix [num_rows, W] of one table, detached: writing to it writes to the table."""

    def parts(self, name: str) -> list[Tensor]:
        """What this process holds of a table, detached: writing to it writes to the table."""
        return [self.table(name)]

    def round_to_served(self, name: str) -> None:
        """Replaces every row of a table by the value that serving will read in the table's precision.

        Raises:
            ValueError: when an entry cannot be stored in it.
        """
        rows = self.table(name)
        rows.copy_(served(rows, self.tables[name].precision))

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """What the backend's own optimizer remembers, detached, by table; empty where the optimizer is outside."""

    @torch.no_grad()
    def fill(self, draw: Draw) -> None:
        """Draws the first values of all tables."""
        for name, table in self.tables.items():
            self.table(name).copy_(draw.rows(name, 0, table.num_rows))

    def hand_over(self, other: Lookup) -> None:
        """Gives another lookup, with the same tables, the values in them, and which of them are frozen."""
        other.load_state_dict(self.state_dict())
        other.freeze(self.frozen())

    def frozen(self) -> set[str]:
        """The names of the tables that backward leaves as they are."""
        return set()

    def freeze(self, names: set[str]) -> None:
        """From now on backward leaves these tables as they are."""
        if names:
            raise UserError(f"{type(self).__name__} has no tables to freeze")

    def join_pass(self) -> None:
        """A backward pass within the present one is about to begin, and its steps are to be those of this one."""

    def everyones(self, ids: Tensor) -> Tensor:
        """The ids [N] of a batch; where several processes train these tables together, the ids of all."""
        return ids

    def reorganise(self, encoding: Encoding, arrays: Mapping[str, Tensor], generator: np.random.Generator) -> None:
        """Lets an adaptive method change its tables, and its arrays by name, in place."""
        moments = self.optimizer_state()
        encoding.adapt({n: LiveTable(self.table(n), moments.get(n)) for n in encoding.tables}, arrays, generator)

    def named_state(self) -> dict[str, Tensor]:
        """The tables."""
        return {name: self.table(name) for name in self.tables}

    def optional_state(self) -> dict[str, Tensor]:
        """What the backend's optimizer remembers; a backend whose optimizer is outside leaves it aside."""
        return {f"{name}.optimizer": state for name, state in self.optimizer_state().items()}

    def is_optional(self, name: str) -> bool:
        """Whether it is some backend's optimizer state of a table that is here."""
        return name.endswith(".optimizer") and name.removesuffix(".optimizer") in self.tables


class StackedLookup(Lookup):
    """Tables stacked by width.

    Each table is listed as a parameter, a view of its rows in the stack: `requires_grad_(False)` freezes it, and what
    averages, counts or copies the parameters of a module sees it. A fused table's `grad` is always None.
    """

    def __init__(self, tables: Sequence[Table], fused: FusedOptimizer | None = None) -> None:
        super().__init__(tables, fused)
        self.listed: dict[str, nn.Parameter] = {}
        self.places: dict[str, Place] = {}
        self.stacked_rows: dict[int, int] = {}
        for table in tables:
            self.base[table.name] = self.stacked_rows.get(table.width, 0)
            self.stacked_rows[table.width] = self.base[table.name] + table.num_rows

    @abstractmethod
    def stack(self, width: int) -> Tensor:
        """The matrix [R, W] that holds all tables of a width, detached: writing to it writes to the tables."""

    def table(self, name: str) -> Tensor:
        """A part of the matrix."""
        table = self.tables[name]
        return self.stack(table.width)[self.base[name] : self.base[name] + table.num_rows]

    def list_tables(self) -> None:
        """Lists the tables as parameters, once the stacks are there."""
        self._of_width: dict[int, list[nn.Parameter]] = {width: [] for width in self.stacked_rows}
        for name, table in self.tables.items():
            self.listed[name] = nn.Parameter(self.table(name))
            self.places[name] = planted(self, name, self.listed[name])
            self._of_width[table.width].append(self.listed[name])

    def relist(self) -> None:
        """Lets the parameters be views of the stacks again, once these were made anew."""
        for name, parameter in self.listed.items():
            parameter.data = self.table(name)

    def listed_of(self, width: int) -> list[nn.Parameter]:
        """The parameters of the tables of a width, in the order in which they are stacked."""
        return self._of_width[width]

    def frozen(self) -> set[str]:
        """The names of the tables that backward leaves as they are."""
        return {name for name, parameter in self.listed.items() if not parameter.requires_grad}

    def freeze(self, names: set[str]) -> None:
        """From now on backward leaves these tables as they are."""
        for name in names:
            self.listed[name].requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the parameters: copies of views would be no views of the copied stacks."""
        listed = {name: (each.requires_grad, each.grad) for name, each in self.listed.items()}
        return self.__dict__ | {"_parameters": {}, "_modules": {}, "places": {}, "listed": listed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        flags, self.listed = self.listed, {}
        self.list_tables()
        for name, (requires_grad, gradient) in flags.items():  # type: ignore[misc]
            self.listed[name].requires_grad_(requires_grad)
            self.listed[name].grad = gradient


class SummingLookup(StackedLookup):
    """A stacked lookup that only sums: one call for each width serves all requests."""

    @abstractmethod
    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """[B, W]: sums of (weighted) rows; bag b holds rows[offsets[b]:offsets[b + 1]], without offsets rows[b]."""

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers each request with its sums [B, W], reading each width's matrix once."""
        answers: list[Tensor | None] = [None] * len(requests)
        for width in dict.fromkeys(request.width for request in requests):
            chosen = [i for i, request in enumerate(requests) if request.width == width]
            group = [requests[i] for i in chosen]
            sums = self.sum_bags(width, *_joined(group))
            if len(group) == 1:  # a split would copy the gradient
                answers[chosen[0]] = sums
                continue
            sizes = [len(r.rows) if r.lengths is None else len(r.lengths) for r in group]
            for i, part in zip(chosen, sums.split(sizes), strict=True):
                answers[i] = part
        return [answer for answer in answers if answer is not None]


def _joined(group: Sequence[Request]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, bag offsets (None where every row is a bag) and weights of several requests, one after the other.

    Raises:
        UserError: where weights or lengths do not fit the rows.
    """
    for request in group:
        _check(request)
    rows = _cat([request.rows for request in group])
    offsets = None
    if any(request.lengths is not None for request in group):
        lengths = _cat([torch.ones_like(r.rows) if r.lengths is None else r.lengths for r in group])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
    if all(request.weights is None for request in group):
        return rows, offsets, None
    one = next(request.weights for request in group if request.weights is not None)
    factors = [one.new_ones(len(r.rows)) if r.weights is None else r.weights for r in group]
    return rows, offsets, _cat(factors)


def _check(request: Request) -> None:
    """Makes sure that a kernel reads no further than the request goes; lengths only on a CPU, which need not wait."""
    check_weights(request.weights, len(request.rows), request.width)
    if request.lengths is not None and not request.lengths.is_cuda:
        check_lengths(request.lengths, len(request.rows), request.width)


def check_weights(weights: Tensor | None, ids: int, width: int) -> None:
    """Makes sure that there is one weight for each id.

    Raises:
        UserError: where there is not.
    """
    if weights is not None and weights.shape != (ids,):
        raise UserError(
            f"rows of width {width}: weights of shape {list(weights.shape)} for {ids} ids; one for each is needed"
        )


def check_lengths(lengths: Tensor, ids: int, width: int) -> None:
    """Makes sure that bags hold all ids between them.

    Raises:
        UserError: where they do not.
    """
    least, total = (int(lengths.min()), int(lengths.sum())) if len(lengths) else (0, 0)
    if least < 0 or total != ids:
        raise UserError(
            f"rows of width {width}: lengths of bags (the least {least}) add up to {total}, and there are {ids} ids"
        )


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


class TorchLookup(SummingLookup):
    """Plain torch: the tables are parameters, trained by any torch optimizer. The reference.

    Args:
        tables: the physical tables.
        sparse: give sparse gradients, for torch.optim.SparseAdam, SGD and Adagrad.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device | str, sparse: bool = False) -> None:
        super().__init__(tables)
        self.sparse = sparse
        self._stacks = {
            width: torch.zeros(rows, width, dtype=torch.float32, device=device)
            for width, rows in self.stacked_rows.items()
        }
        self.list_tables()

    def stack(self, width: int) -> Tensor:
        """The matrix of this width."""
        return self._stacks[width]

    def matrix(self, width: int) -> Tensor:
        """The same, through which gradients reach the parameters."""
        parameters = [at(self.places[name]) for name, table in self.tables.items() if table.width == width]
        if len(parameters) == 1:
            return parameters[0]
        if torch.compiler.is_compiling() or not _side_by_side(parameters, self._stacks[width]):
            return torch.cat(parameters)  # torch.func has put other tensors in their place
        matrix: Tensor = _Stacked.apply(self._stacks[width], *parameters)
        return matrix

    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Sums by torch's own embedding bag."""
        matrix = self.matrix(width)
        return F.embedding_bag(
            rows,
            matrix,
            torch.arange(len(rows) + 1, device=rows.device) if offsets is None else offsets,
            mode="sum",
            sparse=self.sparse,
            per_sample_weights=None if weights is None else weights.to(matrix.dtype),
            include_last_offset=True,
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Empty: the optimizer is the user's."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchLookup:
        """Follows `.to(...)`: the stacks move, and the parameters stay views of them."""
        self._stacks = {width: fn(stack) for width, stack in self._stacks.items()}
        self.relist()
        for parameter in self.listed.values():
            if parameter.grad is not None:
                parameter.grad = fn(parameter.grad)
        return self


def _side_by_side(parameters: Sequence[Tensor], stack: Tensor) -> bool:
    """Whether parameters are the rows of a stack, one after the other."""
    at = stack.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != at or parameter.dtype != stack.dtype:
            return False
        at += parameter.numel() * parameter.element_size()
    return True


class _Stacked(torch.autograd.Function):
    """Parameters that lie side by side, as one matrix without a copy."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [len(parameter) for parameter in parameters]
        return stack.view_as(stack)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_split_sparse if gradient.is_sparse else torch.split)(gradient, ctx.sizes)


def _split_sparse(gradient: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """A sparse matrix [R, W] cut into so many rows each."""
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    starts = torch.tensor([0, *sizes]).cumsum(0).to(rows.device)
    ends = torch.searchsorted(rows, starts).tolist()
    parts = zip(starts.tolist(), sizes, pairwise(ends), strict=False)
    return tuple(
        torch.sparse_coo_tensor(rows[a:b].unsqueeze(0) - start, values[a:b], (size, values.shape[1]))
        for start, size, (a, b) in parts
    )


def moved(fn: Callable[[Tensor], Tensor], device: torch.device, backend: str) -> torch.device:
    """Where `.to(...)` of a module takes tables from a device.

    Args:
        fn: what `torch.nn.Module.to` and its like do to each tensor.
        device: of the tables.
        backend: which trains them in float32.

    Raises:
        UserError: when they should become numbers of another type.
    """
    probe = fn(torch.empty(0, dtype=torch.float32, device=device))
    if probe.dtype != torch.float32:
        kind = str(probe.dtype).removeprefix("torch.")
        raise UserError(
            f"the {backend} backend trains float32 tables, and cannot make them {kind}; use torch.autocast for a model "
            "of less precision, or backend='torch'"
        )
    return probe.device


def usable_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        UserError: when torch does not know it, or cannot put anything there.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        why = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"device {device!r} cannot be used here: {why}") from None
    return found


def padded(width: int) -> int:
    """The width of rows inside fbgemm: the next multiple of 4."""
    return -(-width // 4) * 4


def make_lookup(
    tables: Sequence[Table], backend: str, device: torch.device | str, optimizer: Optimizer | None
) -> Lookup:
    """The backend of a name.

    Raises:
        UserError: for an unknown backend, or a table optimizer with the torch backend.
    """
    if backend == "fbgemm":
        from embtab.fbgemm import FbgemmLookup

        return FbgemmLookup(tables, device, FusedOptimizer(optimizer or Optimizer()))
    if backend == "native":
        from embtab.native import NativeLookup, check_device

        check_device(torch.device(device))
        return NativeLookup(tables, FusedOptimizer(optimizer or Optimizer()))
    if backend == "torch":
        if optimizer is not None:
            raise UserError("the torch backend has no optimizer of its own; give tables.parameters() to a torch one")
        return TorchLookup(tables, device)
    hint = "; tables are sharded by the Trainer's strategy, embtab.TorchRecStrategy()" if backend == "torchrec" else ""
    raise UserError(f"unknown lookup backend {backend!r}; there are torch, fbgemm and native{hint}")
