"""Lookups and updates by a compiled loop of our own, for CPUs: `native.cpp`, built by the C++ compiler on first use.

What it does otherwise than a kernel for any processor:

- rows are asked for sixteen entries before they are needed, and tables lie in large pages: most of a lookup in a table
  that no cache holds is waiting for memory; many vectors are written past the caches, which then need not read them;
- rows are computed of ids in one pass, hashes and quotients included;
- vectors are read table after table, which is nearly twice as quick as sample after sample, and written where they
  belong, [B, F, D], so that nothing is transposed; rows that make one vector together are put side by side, added or
  multiplied on the way;
- an update sums up the gradients of each row, found by a hash, and steps once; nothing is sorted;
- widths are not padded.

Every sum has one order and no multiplication is fused with an addition, so that tables come out bit by bit the same
with any number of threads, on any processor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.compiler import build, in_large_pages, together
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS, FusedOptimizer, Optimizer
from embtab.lookup import Joined, Request, StackedLookup, moved
from embtab.methods import Table
from embtab.methods.base import ARITHMETICS, JOININGS

MAX_ROWS = 2**32
"""Rows of one width that an update can tell apart."""

WORTH_A_THREAD = 1 << 16
"""Numbers read for each thread, at least; a thread costs as much as some thousands of them."""


class NativeLookup(StackedLookup):
    """Our own loop, with the optimizer fused into backward; no gradient is ever stored.

    Args:
        tables: the physical tables.
        fused: what backward does with the rows that were read.

    Raises:
        UserError: where there is no C++ compiler, or a width has 2^32 rows or more.
    """

    joins = True
    fused: FusedOptimizer

    def __init__(self, tables: Sequence[Table], fused: FusedOptimizer) -> None:
        super().__init__(tables, fused)
        compiled_loop()
        for width, rows in self.stacked_rows.items():
            if rows >= MAX_ROWS:
                raise UserError(
                    f"the native backend takes fewer than 2^32 rows of one width; {rows} have width {width}"
                )
        self._stacks = {width: _Stack(rows, width, self.optimizer) for width, rows in self.stacked_rows.items()}
        # What autograd has to see so that it comes back: the tables get no gradient from it.
        self._hook = torch.zeros(0, dtype=torch.float32, requires_grad=True)
        self.list_tables()

    def placed_rows(
        self, arithmetic: str, ids: Tensor, sizes: Sequence[int], bases: Tensor, constants: Tensor
    ) -> Tensor:
        """In one pass; see the base class."""
        ids, rows = ids.contiguous(), ids.new_empty(bases.shape[1], len(ids))
        counts = (ctypes.c_int64 * len(sizes))(*sizes)
        pointers = bases.data_ptr(), constants.data_ptr(), rows.data_ptr()
        kind = ARITHMETICS.index(arithmetic)
        compiled_loop().embtab_place_rows(kind, ids.data_ptr(), counts, *bases.shape, *pointers)
        return rows

    def stack(self, width: int) -> Tensor:
        """The matrix of this width."""
        return self._stacks[width].rows

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers each request with its sums: [B, W]; or where rows are joined with [B, C, V]."""
        answers: dict[int, Tensor] = {}
        for width in dict.fromkeys(request.width for request in requests):
            chosen = [i for i, request in enumerate(requests) if request.width == width]
            read = _Read([requests[i] for i in chosen])
            weights = [requests[i].weights for i in chosen]
            update = self._update(width)
            trained = any(parameter.requires_grad for parameter in self.listed_of(width))
            hook = self._hook if trained else self._hook.detach()
            numbers: Tensor = _Vectors.apply(hook, self._stacks[width], update, read, *weights)
            shapes = read.shapes
            sizes = [math.prod(shape) for shape in shapes]
            parts = [numbers] if len(sizes) == 1 else numbers.split(sizes)  # a split copies the gradient
            shaped = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            answers |= {i: shaped[at] for i, at in zip(chosen, read.answers, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def _update(self, width: int) -> _Update | None:
        """What backward does to the tables of a width; None where they stay as they are."""
        listed = self.listed_of(width)
        frozen = torch.tensor([not parameter.requires_grad for parameter in listed])
        if not self.training or bool(frozen.all()):
            return None
        if not bool(frozen.any()):
            return _Update(self.fused, None)
        sizes = torch.tensor([len(parameter) for parameter in listed])
        return _Update(self.fused, frozen.repeat_interleave(sizes))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments: [num_rows] for rowwise_adagrad, [num_rows, W] for adagrad, nothing for sgd."""
        if self.optimizer.name == "sgd":
            return {}
        moments = {width: stack.moments for width, stack in self._stacks.items()}
        return {
            name: moments[table.width][self.base[name] : self.base[name] + table.num_rows]
            for name, table in self.tables.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeLookup:
        """Stays where it is.

        Raises:
            UserError: when the tables should go to another device, or become numbers of another type.
        """
        check_device(moved(fn, torch.device("cpu"), "native"))
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
    """

    def __init__(self, count: int, width: int, optimizer: Optimizer) -> None:
        shapes = {"sgd": (0,), "adagrad": (count, width), "rowwise_adagrad": (count,)}
        self.rows = _zeros((count, width))
        self.moments = _zeros(shapes[optimizer.name])


@dataclass(frozen=True)
class _Update:
    """What backward does to the tables that were read.

    Attributes:
        fused: the optimizer.
        frozen: bool [R], rows that stay as they are; or None.
    """

    fused: FusedOptimizer
    frozen: Tensor | None

    @contextmanager
    def sparing(self, stack: _Stack, rows: Sequence[Tensor]) -> Iterator[None]:
        """Puts back, at the end, those of the rows that are frozen."""
        if self.frozen is None:
            yield
            return
        spared = torch.cat([each.flatten() for each in rows]).unique()
        spared = spared[self.frozen[spared]]
        matrices = [stack.rows, *([stack.moments] if len(stack.moments) else [])]
        before = [matrix[spared] for matrix in matrices]
        yield
        for matrix, values in zip(matrices, before, strict=True):
            matrix[spared] = values


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return in_large_pages(torch.empty(shape)).zero_()


class _Vectors(torch.autograd.Function):
    """What is read -> the numbers of all answers, one after the other; backward is the optimizer's step."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        stack: _Stack,
        update: _Update | None,
        read: _Read,
        *weights: Tensor | None,
    ) -> Tensor:
        ctx.stack, ctx.update, ctx.read = stack, update, read
        numbers = torch.empty(sum(map(math.prod, read.shapes)))
        for i in range(len(weights)):
            read.run(i, "embtab_sum_bags", _tables(stack), numbers)
        return numbers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, tables = gradient.contiguous(), _tables(ctx.stack)
        of_weights: list[Tensor | None] = []
        for i, weights in enumerate(ctx.read.weights):
            of_weights.append(torch.empty_like(weights) if ctx.needs_input_grad[4 + i] else None)
            if of_weights[i] is not None:
                ctx.read.run(i, "embtab_weight_gradients", tables, gradient, of_weights[i])
        if ctx.update is not None:
            settings = ctx.update.fused.settings
            most = settings.max_gradient
            with ctx.update.sparing(ctx.stack, ctx.read.rows):
                ctx.read.update(_tables(ctx.stack, settings), gradient if most is None else gradient.clamp(-most, most))
        return None, None, None, None, *of_weights


class _Read:
    """What requests to tables of one width read, as `native.cpp` takes it.

    Attributes:
        shapes: of the answers, which lie one after the other.
        answers: for each request, which of them is its.
        weights: of the ids of each request, float32 [N] or None.
        rows: of each request, int64 [K, N].
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.answers: list[int] = []
        self.weights: list[Tensor | None] = []
        self.rows: list[Tensor] = []
        self._ids = 0
        self._kept: list[Tensor | None] = []  # so that their memory stays
        self._batches = (_CBatch * len(requests))()
        places: dict[int, int] = {}  # of the answers, by the identity of their targets
        targets = []  # kept, so that no two have the same
        for i, request in enumerate(requests):
            rows = torch.atleast_2d(request.rows.contiguous())
            offsets = None if request.lengths is None else F.pad(request.lengths.long().cumsum(0), (1, 0))
            weights = None if request.weights is None else request.weights.detach().float().contiguous()
            bags = rows.shape[1] if offsets is None else len(offsets) - 1
            joined = request.joined or Joined("concat", torch.tensor([0]), (bags, 1, request.width))
            shape = joined.target if request.joined else (bags, request.width)
            if id(joined.target) not in places:
                places[id(joined.target)] = len(self.shapes)
                self.shapes.append(shape)
            self.answers.append(places[id(joined.target)])
            targets.append(joined.target)
            self.weights.append(weights)
            self._ids += rows.numel()
            self.rows.append(rows)
            self._kept += [offsets, joined.columns]
            self._batches[i] = _CBatch(
                rows.data_ptr(),
                _pointer(offsets),
                _pointer(weights),
                rows.shape[1],
                len(joined.columns),
                joined.target[0],
                len(rows),
                JOININGS.index(joined.joining),
                joined.columns.data_ptr(),
                joined.target[1],
                sum(map(math.prod, self.shapes[: self.answers[i]])),
            )

    def run(self, i: int, name: str, tables: _CTables, *tensors: Tensor) -> None:
        """Calls a function for all bags of a request, in as many threads as are worth it."""
        function, batch = getattr(compiled_loop(), name), ctypes.byref(self._batches[i])
        pointers = [tensor.data_ptr() for tensor in tensors]
        threads, bags = self._threads(tables), self._batches[i].features * self._batches[i].bags
        ends = [bags * part // threads for part in range(threads + 1)]
        together([partial(function, batch, ctypes.byref(tables), *pointers, *part) for part in pairwise(ends)])

    def update(self, tables: _CTables, gradient: Tensor) -> None:
        """The optimizer's step on the rows that were read, by the gradients of the vectors."""
        library, threads = compiled_loop(), self._threads(tables)
        given = ctypes.byref(tables), gradient.data_ptr()
        begin = partial(library.embtab_begin_update, self._batches, len(self._batches), *given)
        begun = together([partial(begin, part, threads) for part in range(threads)])
        stepped = given[0] if all(begun) else None
        failed = together([partial(library.embtab_end_update, each, stepped) for each in begun if each])
        if not all(begun) or any(failed):
            raise MemoryError(f"no memory left for the update of {self._ids} rows")

    def _threads(self, tables: _CTables) -> int:
        worth = self._ids * tables.width // WORTH_A_THREAD
        return max(1, min(torch.get_num_threads(), worth))


class _CBatch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "offsets", "weights")),
        *((name, ctypes.c_int64) for name in ("ids", "features", "bags", "parts", "op")),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("across", "first")),
    )


class _CTables(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "moments")),
        *((name, ctypes.c_int64) for name in ("count", "width", "optimizer")),
        *((name, ctypes.c_float) for name in ("lr", "eps", "weight_decay")),
    )


def _tables(stack: _Stack, settings: Optimizer | None = None) -> _CTables:
    """The stack as `native.cpp` takes it; to be read only, without settings of an optimizer."""
    settings = settings or Optimizer("sgd", lr=0.0)
    kind = OPTIMIZERS.index(settings.name)
    pointers = stack.rows.data_ptr(), stack.moments.data_ptr()
    return _CTables(*pointers, *stack.rows.shape, kind, settings.lr, settings.eps, settings.weight_decay)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def compiled_loop() -> ctypes.CDLL:
    """`native.cpp` as a library.

    Raises:
        UserError: where it cannot be built.
    """
    library = build(Path(__file__).with_suffix(".cpp"), "the native backend", "-ffp-contract=off")
    pointer, integer, nothing = ctypes.c_void_p, ctypes.c_int64, None
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "embtab_place_rows": (nothing, [integer, *[pointer] * 2, *[integer] * 2, *[pointer] * 3]),
        "embtab_sum_bags": (nothing, [*[pointer] * 3, *[integer] * 2]),
        "embtab_weight_gradients": (nothing, [*[pointer] * 4, *[integer] * 2]),
        "embtab_begin_update": (pointer, [pointer, integer, pointer, pointer, *[integer] * 2]),
        "embtab_end_update": (ctypes.c_int32, [pointer] * 2),
    }
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library
