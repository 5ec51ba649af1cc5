"""Lookups and updates by a compiled loop of our own, for CPUs: `native.cpp`, built by the C++ compiler on first use.

What it does otherwise than a kernel for any processor:

- rows are asked for sixteen entries before they are needed, and tables lie in large pages: most of a lookup in a table
  that no cache holds is waiting for memory;
- vectors [B, F, D] are read table after table, which is nearly twice as quick as sample after sample, and written where
  they belong, so that nothing is transposed;
- an update sums the gradients of a row in the order of its ids and steps once; nothing is sorted;
- widths are not padded.

Every sum has one order and no multiplication is fused with an addition, so that tables come out bit by bit the same
with any number of threads, on any processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embtab.compiler import build
from embtab.errors import UserError
from embtab.lookup import OPTIMIZERS, Optimizer, StackedLookup
from embtab.methods import Table

MAX_ROWS = 2**32
"""Rows of one width that an update can tell apart."""

WORTH_A_THREAD = 1 << 16
"""Numbers read for each thread, at least; a thread costs as much as some thousands of them."""


class NativeLookup(StackedLookup):
    """Our own loop, with the optimizer fused into backward; no gradient is ever stored.

    As with fbgemm the tables are no torch parameters: no outer optimizer can touch them.

    Args:
        tables: the physical tables.
        optimizer: what backward does with the rows that were read.

    Raises:
        UserError: where there is no C++ compiler, or a width has 2^32 rows or more.
    """

    def __init__(self, tables: Sequence[Table], optimizer: Optimizer) -> None:
        super().__init__(tables)
        self.optimizer = optimizer
        _library()
        for width, rows in self.stacked_rows.items():
            if rows >= MAX_ROWS:
                raise UserError(f"the native backend takes fewer than 2^32 rows of one width; {rows} have width {width}")
        self._stacks = {width: _Stack(rows, width, optimizer) for width, rows in self.stacked_rows.items()}
        # What autograd has to see so that it comes back: the tables are not its parameters.
        self._hook = torch.zeros(0, requires_grad=True)

    def stack(self, width: int) -> Tensor:
        """The matrix of this width."""
        return self._stacks[width].rows

    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Sums by the compiled loop; backward updates the rows."""
        sums: Tensor = _Sums.apply(self._hook, weights, self._stacks[width], self.optimizer, rows, offsets)
        return sums

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments: [num_rows] for rowwise_adagrad, [num_rows, W] for adagrad, nothing for sgd."""
        if self.optimizer.name == "sgd":
            return {}
        moments = {width: stack.moments for width, stack in self._stacks.items()}
        return {
            name: moments[table.width][self.base[name] : self.base[name] + table.num_rows]
            for name, table in self.tables.items()
        }

    def set_learning_rate(self, lr: float) -> None:
        """Changes the learning rate of all tables from the next backward on."""
        for stack in self._stacks.values():
            stack.lr = lr

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeLookup:
        """Stays where it is.

        Raises:
            UserError: when the tables should go to another device.
        """
        super()._apply(fn, recurse)
        check_device(fn(torch.empty(0)).device)
        return self


def check_device(device: torch.device) -> None:
    """Makes sure that it is the CPU.

    Raises:
        UserError: when it is not.
    """
    if device.type != "cpu":
        raise UserError(f"the native backend trains on CPUs; for device {str(device)!r} take backend='fbgemm'")


class _Stack:
    """The tables of one width, as one matrix.

    Attributes:
        rows: float32 [R, W].
        moments: of the optimizer: float32 [R], [R, W] or [0].
        lr: the learning rate.
    """

    def __init__(self, count: int, width: int, optimizer: Optimizer) -> None:
        shapes = {"sgd": (0,), "adagrad": (count, width), "rowwise_adagrad": (count,)}
        self.rows = _zeros((count, width))
        self.moments = _zeros(shapes[optimizer.name])
        self.lr = optimizer.lr


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in large pages, where the system has them."""
    memory = torch.empty(shape)
    _library().embtab_large_pages(memory.data_ptr(), memory.nbytes)
    return memory.zero_()


class _Sums(torch.autograd.Function):
    """Rows -> sums over bags [bags, W]; backward is the optimizer's step."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        weights: Tensor | None,
        stack: _Stack,
        optimizer: Optimizer,
        rows: Tensor,
        offsets: Tensor | None,
    ) -> Tensor:
        ctx.batch = _Batch(rows, offsets, weights)
        ctx.stack, ctx.optimizer = stack, optimizer
        sums = torch.empty(ctx.batch.bags, stack.rows.shape[1])
        ctx.batch.run("embtab_sum_bags", _tables(stack, optimizer), sums.data_ptr())
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, batch, stack = gradient.float().contiguous(), ctx.batch, ctx.stack
        tables = _tables(stack, ctx.optimizer)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = torch.empty_like(batch.weights)
            batch.run("embtab_weight_gradients", tables, gradient.data_ptr(), of_weights.data_ptr())
        batch.update(tables, gradient)
        return None, of_weights, None, None, None, None


class _Batch:
    """What is read, as `native.cpp` takes it.

    Args:
        rows: int64 [N]; or [B, F] or [B, F, K], where every row is a bag: best in the order [F, K, B] in memory.
        offsets: int64 [bags + 1], or None.
        weights: float32 [N], or None.
    """

    def __init__(self, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
        by_feature = rows.flatten(1).t() if rows.dim() > 1 else rows.unsqueeze(0)
        self.rows = by_feature.contiguous()
        self.offsets = None if offsets is None else offsets.contiguous()
        self.weights = None if weights is None else weights.detach().float().contiguous()
        self.bags = rows.numel() if offsets is None else len(offsets) - 1
        features = len(self.rows)
        self._given = _CBatch(
            self.rows.data_ptr(),
            _pointer(self.offsets),
            _pointer(self.weights),
            rows.numel(),
            features,
            self.bags // features if features else 0,
        )

    def run(self, name: str, tables: _CTables, *pointers: int) -> None:
        """Calls a function for all bags, in as many threads as are worth it."""
        function = getattr(_library(), name)
        threads = self._threads(tables)
        ends = [self.bags * i // threads for i in range(threads + 1)]
        _together(
            [
                lambda a=a, b=b: function(ctypes.byref(self._given), ctypes.byref(tables), *pointers, a, b)
                for a, b in zip(ends, ends[1:], strict=False)
            ]
        )

    def update(self, tables: _CTables, gradient: Tensor) -> None:
        """The optimizer's step on the rows that were read, by gradients [bags, W] of their sums."""
        function, threads = _library().embtab_update, self._threads(tables)
        failed = _together(
            [
                lambda i=i: function(ctypes.byref(self._given), ctypes.byref(tables), gradient.data_ptr(), i, threads)
                for i in range(threads)
            ]
        )
        if any(failed):
            raise MemoryError(f"no memory left for the update of {self.rows.numel()} rows")

    def _threads(self, tables: _CTables) -> int:
        worth = self.rows.numel() * tables.width // WORTH_A_THREAD
        return max(1, min(torch.get_num_threads(), worth))


def _together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that let go of Python's lock, each but the first in a thread of its own."""
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls) - 1) as pool:
        others = [pool.submit(call) for call in calls[1:]]
        return [calls[0](), *(other.result() for other in others)]


class _CBatch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("bags", ctypes.c_int64),
    )


class _CTables(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("moments", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("optimizer", ctypes.c_int32),
        ("lr", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


def _tables(stack: _Stack, optimizer: Optimizer) -> _CTables:
    count, width = stack.rows.shape
    kind = OPTIMIZERS.index(optimizer.name)
    return _CTables(stack.rows.data_ptr(), stack.moments.data_ptr(), count, width, kind, stack.lr, optimizer.eps)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _library() -> ctypes.CDLL:
    library = build(Path(__file__).with_suffix(".cpp"))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.embtab_large_pages.argtypes = [pointer, integer]
    library.embtab_large_pages.restype = None
    library.embtab_sum_bags.argtypes = [pointer] * 3 + [integer] * 2
    library.embtab_sum_bags.restype = None
    library.embtab_weight_gradients.argtypes = [pointer] * 4 + [integer] * 2
    library.embtab_weight_gradients.restype = None
    library.embtab_update.argtypes = [pointer] * 3 + [integer] * 2
    library.embtab_update.restype = ctypes.c_int32
    return library
