"""Dice by a compiled loop of our own, for CPUs: `dice.cpp`, built on first use; one pass over the numbers each way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embtab.compiler import build_or_warn, together

WORTH_A_THREAD = 1 << 16
"""Numbers of each thread, at least."""


def compiled(s: Tensor, alpha: Tensor) -> bool:
    """Whether `dice` takes them: float32 on a CPU, s a matrix, where there is a C++ compiler; else a warning, once."""
    simple = s.device.type == "cpu" and s.dtype == alpha.dtype == torch.float32 and s.dim() == 2
    return simple and not torch.compiler.is_compiling() and compiled_loop() is not None


def dice(s: Tensor, alpha: Tensor, mean: Tensor, scale: Tensor, of_batch: bool) -> Tensor:
    """Of numbers s: s * (alpha + (1 - alpha) * sigmoid((s - mean) * scale)); s is kept for backward, and nothing else.

    Args:
        s: float32 [N, H]; `Dice` makes sure of H.
        alpha: float32 [H].
        mean: float32 [H], subtracted.
        scale: float32 [H], what the rest is multiplied with.
        of_batch: whether mean and scale are those of s, so that gradients reach it by way of them, too.

    Returns:
        float32 [N, H].
    """
    out: Tensor = _Dice.apply(s.contiguous(), alpha.contiguous(), mean, scale, of_batch)
    return out


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: Tensor, mean: Tensor, scale: Tensor, of_batch: bool) -> Tensor:
        out = torch.empty_like(s)
        _run("embtab_dice", (alpha, mean, scale), s, out)
        ctx.save_for_backward(s, alpha, mean, scale)
        ctx.of_batch = of_batch
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        s, *columns = ctx.saved_tensors
        of_s = torch.empty_like(s)
        # Threads add to sums of their own.
        sums = s.new_zeros(_parts(s), 3, s.shape[1], dtype=torch.float64)
        _run("embtab_dice_backward", columns, s, gradient.contiguous(), of_s, sums=sums)
        of_alpha, of_z, of_z_by_z = sums.sum(0).float()
        if ctx.of_batch:
            factor = columns[2] / len(s)
            _run("embtab_dice_of_batch", columns, s, of_z * factor, of_z_by_z * factor, of_s)
        return of_s, of_alpha, None, None, None


def _run(name: str, columns: Sequence[Tensor], s: Tensor, *tensors: Tensor, sums: Tensor | None = None) -> None:
    """Calls a function for all rows, in as many threads as are worth it; each has a part of the sums."""
    library, parts = compiled_loop(), _parts(s)
    given = _CColumns(*(column.data_ptr() for column in columns), s.shape[1])
    pointers = [tensor.data_ptr() for tensor in (s, *tensors)]
    calls = []
    for part, ends in enumerate(pairwise(len(s) * i // parts for i in range(parts + 1))):
        own = [] if sums is None else [sums[part].data_ptr()]
        calls.append(partial(getattr(library, name), ctypes.byref(given), *pointers, *own, *ends))
    if any(together(calls)):
        raise MemoryError(f"no memory left for Dice of width {s.shape[1]}")


def _parts(s: Tensor) -> int:
    """Threads worth starting."""
    return max(1, min(torch.get_num_threads(), s.numel() // WORTH_A_THREAD))


class _CColumns(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("alpha", "mean", "scale")),
        ("width", ctypes.c_int64),
    )


@cache
def compiled_loop() -> ctypes.CDLL | None:
    """`dice.cpp` as a library; None, after a warning, where it cannot be built."""
    library = build_or_warn(Path(__file__).with_suffix(".cpp"), "Dice", "-ffp-contract=fast")
    if library is not None:
        pointer, integer, result = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        for name, pointers, returns in (
            ("embtab_dice", 3, None),
            ("embtab_dice_backward", 5, result),
            ("embtab_dice_of_batch", 5, None),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = returns, [pointer] * pointers + [integer] * 2
    return library
