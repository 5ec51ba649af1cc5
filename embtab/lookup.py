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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.drawing import Draw
from embtab.errors import UserError
from embtab.methods import Encoding, Table
from embtab.methods.base import LiveTable
from embtab.state import NamedState

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


@dataclass(frozen=True)
class Optimizer:
    """The optimizer that the fbgemm and native backends apply to their tables inside backward.

    Args:
        name: "sgd"; "adagrad" (a second moment per entry); or "rowwise_adagrad" (one per row: the mean of squares).
        lr: learning rate.
        eps: added to the root of the second moment; unused by sgd.
    """

    name: str = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(f"table optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}")
        if not self.lr >= 0:
            raise UserError(f"table optimizer: lr must be zero or more, got {self.lr!r}")


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
        joins: whether the lookup makes vectors of several rows itself, and rows of ids by `placed_rows`.
    """

    joins: ClassVar[bool] = False

    def __init__(self, tables: Sequence[Table]) -> None:
        super().__init__()
        self.tables = {table.name: table for table in tables}
        self.base = dict.fromkeys(self.tables, 0)

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

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """What the backend's own optimizer remembers, detached, by table; empty where the optimizer is outside."""

    @torch.no_grad()
    def fill(self, draw: Draw) -> None:
        """Draws the first values of all tables."""
        for name, table in self.tables.items():
            self.table(name).copy_(draw.rows(name, 0, table.num_rows))

    def hand_over(self, other: Lookup) -> None:
        """Gives another lookup, with the same tables, the values in them."""
        other.load_state_dict(self.state_dict())

    def everyones(self, ids: Tensor) -> Tensor:
        """The ids [N] of a batch; where several processes train these tables together, the ids of all."""
        return ids

    def reorganise(self, encoding: Encoding, arrays: Mapping[str, Tensor], generator: np.random.Generator) -> None:
        """Lets an adaptive method change its tables, and its arrays by name, in place."""
        moments = self.optimizer_state()
        encoding.adapt({n: LiveTable(self.table(n), moments.get(n)) for n in encoding.tables}, arrays, generator)

    def set_learning_rate(self, lr: float) -> None:
        """Changes the learning rate of all tables from the next backward on.

        Raises:
            UserError: where the optimizer is outside.
        """
        raise UserError("the torch backend has no optimizer of its own; change the learning rate of yours")

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
    """Tables stacked by width."""

    def __init__(self, tables: Sequence[Table]) -> None:
        super().__init__(tables)
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
    """Rows, bag offsets (None where every row is a bag) and weights of several requests, one after the other."""
    rows = _cat([request.rows for request in group])
    offsets = None
    if any(request.lengths is not None for request in group):
        lengths = _cat([torch.ones_like(r.rows) if r.lengths is None else r.lengths for r in group])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
    if all(request.weights is None for request in group):
        return rows, offsets, None
    ones = [r.weights if r.weights is not None else torch.ones(len(r.rows), device=rows.device) for r in group]
    return rows, offsets, _cat(ones)


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
        for width, rows in self.stacked_rows.items():
            self.register_parameter(f"width{width}", nn.Parameter(torch.zeros(rows, width, device=device)))

    def stack(self, width: int) -> Tensor:
        """The parameter of this width, detached."""
        return self.get_parameter(f"width{width}").detach()

    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Sums by torch's own embedding bag."""
        return F.embedding_bag(
            rows,
            self.get_parameter(f"width{width}"),
            torch.arange(len(rows) + 1, device=rows.device) if offsets is None else offsets,
            mode="sum",
            sparse=self.sparse,
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Empty: the optimizer is the user's."""
        return {}


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

        return FbgemmLookup(tables, device, optimizer or Optimizer())
    if backend == "native":
        from embtab.native import NativeLookup, check_device

        check_device(torch.device(device))
        return NativeLookup(tables, optimizer or Optimizer())
    if backend == "torch":
        if optimizer is not None:
            raise UserError("the torch backend has no optimizer of its own; give tables.parameters() to a torch one")
        return TorchLookup(tables, device)
    hint = "; tables are sharded by the Trainer's strategy, embtab.TorchRecStrategy()" if backend == "torchrec" else ""
    raise UserError(f"unknown lookup backend {backend!r}; there are torch, fbgemm and native{hint}")
