"""`native.cpp` as Python sees it: what is read and the tables as its structs, and calls in as many threads as pay.

Everything that reaches it is checked first, for it reads and writes wherever it is told to.
"""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embtab.compiler import build
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS, Optimizer
from embtab.lookup.base import Joined, Request
from embtab.lookup.stacked import check_lengths, check_weights
from embtab.methods.base import ARITHMETICS, JOININGS

MAX_NOTED = 2**32
"""Rows read, or pieces of the gradient, from which on one thread updates alone: several note places in 32 bits."""

WORTH_A_THREAD = 1 << 16
"""Numbers read for each thread, at least; a thread costs as much as some thousands of them."""


class CBatch(ctypes.Structure):
    """`Batch` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "offsets", "weights")),
        *((name, ctypes.c_int64) for name in ("ids", "features", "bags", "parts", "op")),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("across", "first")),
        *((name, ctypes.c_void_p) for name in ("saved", "gradient")),
    )


class CTables(ctypes.Structure):
    """`Tables` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "moments")),
        *((name, ctypes.c_int64) for name in ("count", "width", "optimizer")),
        *((name, ctypes.c_float) for name in ("lr", "eps", "weight_decay", "max_gradient")),
    )


def tables_of(rows: Tensor, moments: Tensor, settings: Optimizer | None) -> CTables:
    """Tables of one width, [R, W], and what the optimizer remembers of them; to be read only, without its settings.

    Raises:
        UserError: where one of them is no float32 in one piece on a CPU.
    """
    for tensor in (rows, moments):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise UserError(
                f"the native backend trains float32 tables on CPUs; those of width {rows.shape[1]} are {kind}"
            )
    settings = settings or Optimizer("sgd", lr=0.0)
    step = OPTIMIZERS.index(settings.name)
    most = math.inf if settings.max_gradient is None else settings.max_gradient
    numbers = settings.lr, settings.eps, settings.weight_decay, most
    return CTables(rows.data_ptr(), moments.data_ptr(), *rows.shape, step, *numbers)


class Read:
    """What requests to tables of one width read.

    Attributes:
        shapes: of the answers, which lie one after the other.
        answers: for each request, which of them is its.
        weights: of the ids of each request, float32 [N] or None.
        rows: of each request, int64 [K, N].
        multiplies: whether rows are factors of each other, so that a gradient needs the rows beside its own.

    Raises:
        UserError: where weights or lengths do not fit the rows.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.answers: list[int] = []
        self.weights: list[Tensor | None] = []
        self.multiplies = False
        self.width = requests[0].width
        self.rows: list[Tensor] = []
        self._kept: list[Tensor | None] = []  # so that their memory stays
        self._batches = (CBatch * len(requests))()
        places: dict[int, int] = {}  # of the answers, by the identity of their targets
        targets = []  # kept, so that no two have the same
        for i, request in enumerate(requests):
            rows = torch.atleast_2d(request.rows.long().contiguous())
            parts, ids = rows.shape
            offsets = None if request.lengths is None else _offsets(request.lengths, ids, self.width)
            weights = None if request.weights is None else _weights(request.weights, ids, self.width)
            bags = ids if offsets is None else len(offsets) - 1
            joined = request.joined or Joined("concat", torch.tensor([0]), (bags, 1, self.width))
            if len(joined.columns) * joined.target[0] != bags:
                raise UserError(
                    f"rows of width {self.width}: {bags} bags for {len(joined.columns)} features of {joined.target[0]}"
                )
            if id(joined.target) not in places:
                places[id(joined.target)] = len(self.shapes)
                self.shapes.append(joined.target if request.joined else (bags, self.width))
            self.answers.append(places[id(joined.target)])
            targets.append(joined.target)
            self.weights.append(weights)
            self.multiplies |= joined.joining == "product" and parts > 1
            self.rows.append(rows)
            self._kept += [offsets, joined.columns]
            self._batches[i] = CBatch(
                rows.data_ptr(),
                _pointer(offsets),
                _pointer(weights),
                ids,
                len(joined.columns),
                joined.target[0],
                parts,
                JOININGS.index(joined.joining),
                joined.columns.data_ptr(),
                joined.target[1],
                sum(map(math.prod, self.shapes[: self.answers[i]])),
            )

    @property
    def size(self) -> int:
        """Numbers of all answers."""
        return sum(map(math.prod, self.shapes))

    @property
    def ids(self) -> int:
        """Rows that are read."""
        return sum(rows.numel() for rows in self.rows)

    def save(self, table: Tensor) -> None:
        """Keeps the rows as they are now: the table is about to change, and a gradient will need them.

        Args:
            table: float32 [R, W], what was read.
        """
        for batch, rows in zip(self._batches, self.rows, strict=True):
            if not batch.saved:
                self._kept.append(table.index_select(0, rows.flatten()))
                batch.saved = _pointer(self._kept[-1])

    def vectors(self, tables: CTables) -> Tensor:
        """The numbers of all answers, one after the other.

        Raises:
            UserError: where a row is none of the tables'.
        """
        numbers = torch.empty(self.size, dtype=torch.float32)
        for i, rows in enumerate(self.rows):
            if self._run(i, "embtab_sum_bags", tables, numbers):
                least, most = map(int, rows.aminmax())
                wrong = least if least < 0 else most
                raise UserError(
                    f"tables of width {self.width}: row {wrong} was asked for, and they have {tables.count} rows "
                    "together; the plan's constants do not fit its tables"
                )
        return numbers

    def weight_gradients(self, i: int, tables: CTables, gradient: Tensor) -> Tensor:
        """float32 [N]: those of the weights of a request, by the gradient of all answers."""
        found = torch.empty_like(self.rows[i][0], dtype=torch.float32)
        self._run(i, "embtab_weight_gradients", tables, gradient, found)
        return found

    def batches(self, gradient: Tensor) -> list[CBatch]:
        """What was read, each with the gradient of all answers."""
        made = []
        for batch in self._batches:
            made.append(CBatch.from_buffer_copy(batch))
            made[-1].gradient = gradient.data_ptr()
        return made

    def _run(self, i: int, name: str, tables: CTables, *tensors: Tensor) -> Any:
        """Calls a function for all bags of a request."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        batch, given = ctypes.byref(self._batches[i]), ctypes.byref(tables)
        return getattr(compiled_loop(), name)(batch, given, *pointers, _threads(self.ids * tables.width))


def update(tables: CTables, reads: Sequence[tuple[Read, Tensor]]) -> None:
    """One step of the optimizer on all rows that were read, by the gradients of the answers.

    Raises:
        MemoryError: where there is none left for the sums of gradients; nothing has changed.
    """
    batches = [batch for read, gradient in reads for batch in read.batches(gradient)]
    ids = sum(read.ids for read, _ in reads)
    given = (CBatch * len(batches))(*batches), len(batches), ctypes.byref(tables)
    pieces = sum(gradient.numel() for _, gradient in reads) // tables.width  # of the gradient, each as wide as a row
    if compiled_loop().embtab_update(*given, _threads(ids * tables.width) if max(ids, pieces) < MAX_NOTED else 1):
        raise MemoryError(f"no memory left for the update of {ids} rows")


def placed_rows(arithmetic: str, ids: Tensor, sizes: Sequence[int], bases: Tensor, constants: Tensor) -> Tensor:
    """Ids to rows; see `Lookup.placed_rows`.

    Raises:
        UserError: where sizes do not fit the ids, or constants that divide are not above zero.
    """
    if sum(sizes) != len(ids):
        raise UserError(f"features with {sum(sizes)} ids together, and {len(ids)} ids: lengths and values do not fit")
    ids, rows = ids.contiguous(), ids.new_empty(bases.shape[1], len(ids))
    counts = (ctypes.c_int64 * len(sizes))(*sizes)
    pointers = bases.data_ptr(), constants.data_ptr(), rows.data_ptr()
    kind = ARITHMETICS.index(arithmetic)
    threads = _threads(rows.numel())
    if compiled_loop().embtab_place_rows(kind, ids.data_ptr(), counts, *bases.shape, *pointers, threads):
        raise UserError(f"ids are divided by a constant below one ({arithmetic}); the plan's constants are wrong")
    return rows


def _threads(numbers: int) -> int:
    """How many are worth it for so many numbers."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), numbers // WORTH_A_THREAD))


_forked = False
"""OpenMP's threads do not come along into a process that was forked, and it waits for them there."""


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _offsets(lengths: Tensor, ids: int, width: int) -> Tensor:
    """int64 [B + 1]: where bags begin."""
    lengths = lengths.long().contiguous()
    offsets = torch.empty(len(lengths) + 1, dtype=torch.int64)
    if compiled_loop().embtab_offsets(lengths.data_ptr(), len(lengths), ids, offsets.data_ptr()):
        check_lengths(lengths, ids, width)
    return offsets


def _weights(weights: Tensor, ids: int, width: int) -> Tensor:
    """float32 [N]: the factors of ids."""
    check_weights(weights, ids, width)
    return weights.detach().float().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def compiled_loop() -> ctypes.CDLL:
    """`native.cpp`, built on first use.

    Raises:
        UserError: where there is no C++ compiler.
    """
    source, why = Path(__file__).with_name("native.cpp"), "the native backend"
    try:
        made = build(source, why, "-ffp-contract=off", "-fopenmp")
    except UserError as error:  # without a compiler, or with one that has no OpenMP
        made = build(source, why, "-ffp-contract=off")
        warnings.warn(f"{why} runs in one thread, for it could not be built with OpenMP: {error}", stacklevel=2)
    pointer, integer, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "embtab_offsets": (code, [pointer, *[integer] * 2, pointer]),
        "embtab_place_rows": (code, [integer, *[pointer] * 2, *[integer] * 2, *[pointer] * 3, integer]),
        "embtab_sum_bags": (code, [*[pointer] * 3, integer]),
        "embtab_weight_gradients": (None, [*[pointer] * 4, integer]),
        "embtab_update": (code, [pointer, integer, pointer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        getattr(made, name).restype, getattr(made, name).argtypes = result, arguments
    return made
