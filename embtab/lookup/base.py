"""Lookup backends: they hold the physical tables, sum rows over bags, and know nothing of methods.

    rows [N], lengths [B] --lookup--> sums [B, W]

    N rows to read   B bags   W width of the table   R rows of all tables of one width

Backends are `embtab.lookup.torch`, `embtab.lookup.fbgemm`, `embtab.lookup.native` and, where tables are spread over
processes, `embtab.sharding.lookup`; all but the last stack tables of one width (`embtab.lookup.stacked`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.init import Draw
from embtab.lookup.named_state import NamedState
from embtab.methods.base import Encoding, LiveTable
from embtab.methods.storage import Table
from embtab.quantise import served


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
        backend: the name that it is asked for by.
        joins: whether the lookup makes vectors of several rows itself, and rows of ids by `placed_rows`.
    """

    backend: ClassVar[str]
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
