"""Tables of one width stacked into one matrix: one call serves them all, whatever the number of bags.

A method's rows are already offset by `base`, so that a batch of any shape is one kernel launch a width. (Measured for
26 tables of 100k rows x 16, batch 4096, uniform ids, one thread: forward, backward and update take 0.62 of the time of
the same kernel with 26 separate tables; two chunks of width 8 in one table 0.57.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.fused import FusedOptimizer
from embtab.lookup.base import Lookup, Request
from embtab.lookup.named_state import Place, planted
from embtab.methods.storage import Table


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
