"""Self-attention over the fields of a row by a compiled loop of our own, for CPUs: `attention.cpp`, built on first use.

All layers of a ranker run at once, forward and backward. The matrices of a row are small (39 x 39 and 39 x 16 on
Criteo): kernels made for large ones reach a third of what the processor can do, because each call multiplies little and
everything between the products goes through memory. Here as many rows as a register holds numbers are computed side by
side, so that no product is too small, and what they need stays in the cache from the first layer to the last. Of the
forward pass only the layers' inputs and outputs are kept; attention is computed anew in backward, which takes less time
than keeping it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embtab.compiler import build_or_warn, in_large_pages, together
from embtab.errors import UserError


def compiled(*tensors: Tensor) -> bool:
    """Whether `attend` takes tensors: all float32 on a CPU, where there is a C++ compiler; else a warning, once."""
    simple = all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)
    return simple and not torch.compiler.is_compiling() and compiled_loop() is not None


def attend(x_bfd: Tensor, matrices: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    """Some layers of multi-head self-attention with a residual: ReLU(softmax(q k^T) v + r) each.

    Args:
        x_bfd: float32 [B, F, I].
        matrices: of each layer, float32 [4 * A, I]: what x is multiplied with for q, k, v and r, A rows each; the next
            layer's I is A. A head has A / heads columns of each, one head after the other.
        heads: of each layer.

    Returns:
        float32 [B, F, A] of the last layer.

    Raises:
        UserError: for matrices that do not fit each other, their heads, or x.
    """
    width = x_bfd.shape[2]
    for matrix, count in zip(matrices, heads, strict=True):
        if matrix.shape[1] != width or len(matrix) % (4 * count):
            raise UserError(f"a matrix {tuple(matrix.shape)} of {count} heads does not fit vectors of {width} numbers")
        width = len(matrix) // 4
    keep = torch.is_grad_enabled() and any(each.requires_grad for each in (x_bfd, *matrices))
    out: Tensor = _Attend.apply(x_bfd.contiguous(), tuple(heads), keep, *(each.contiguous() for each in matrices))
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bfd: Tensor, heads: tuple[int, ...], keep: bool, *matrices: Tensor) -> Tensor:
        rows, fields, width = x_bfd.shape
        widths = [width, *(len(matrix) // 4 for matrix in matrices)]
        out = x_bfd.new_empty(rows, fields, widths[-1])
        lanes = _lanes()
        # The inputs and outputs of all layers, as the loop has them.
        shape = -(-rows // lanes), fields * sum(widths), lanes
        kept = in_large_pages(x_bfd.new_empty(shape)) if keep else x_bfd.new_empty(0)
        pointers = x_bfd.data_ptr(), out.data_ptr(), kept.data_ptr() if keep else None
        _run("embtab_attend", matrices, [None] * len(matrices), heads, x_bfd.shape, pointers)
        ctx.heads, ctx.shape = heads, x_bfd.shape
        ctx.save_for_backward(kept, *matrices)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, *matrices = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = gradient.new_empty(ctx.shape) if ctx.needs_input_grad[0] else None
        pointers = kept.data_ptr(), gradient.data_ptr(), None if of_x is None else of_x.data_ptr()
        parts = _parts(ctx.shape[0])
        # Threads add to sums of their own.
        sums = [matrix.new_zeros(parts, *matrix.shape) for matrix in matrices]
        _run("embtab_attend_backward", matrices, sums, ctx.heads, ctx.shape, pointers)
        return of_x, None, None, *(each.sum(0) for each in sums)


def _run(
    name: str,
    matrices: Sequence[Tensor],
    sums: Sequence[Tensor | None],
    heads: Sequence[int],
    shape: Sequence[int],
    pointers: Sequence[int | None],
) -> None:
    """Calls a function for all groups of rows, in as many threads as torch has; sums: [threads, ...] for gradients."""
    rows, fields, _ = shape
    library, groups, parts = compiled_loop(), -(-rows // _lanes()), _parts(rows)
    calls = []
    for part, (start, stop) in enumerate(pairwise(groups * i // parts for i in range(parts + 1))):
        layers = (_CLayer * len(matrices))(
            *(
                _CLayer(matrix.data_ptr(), None if of is None else of[part].data_ptr(), *_sizes(matrix), count)
                for matrix, of, count in zip(matrices, sums, heads, strict=True)
            )
        )
        calls.append(partial(getattr(library, name), layers, len(layers), fields, rows, *pointers, start, stop))
    if any(together(calls)):
        raise MemoryError(f"no memory left for attention over {fields} fields")


def _sizes(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[1], len(matrix) // 4


def _parts(rows: int) -> int:
    """Threads worth starting."""
    return max(1, min(torch.get_num_threads(), rows // (2 * _lanes())))


class _CLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "gradient")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "heads")),
    )


@cache
def _lanes() -> int:
    """Rows that are computed side by side."""
    library = compiled_loop()
    assert library is not None
    count: int = library.embtab_lanes()
    return count


@cache
def compiled_loop() -> ctypes.CDLL | None:
    """`attention.cpp` as a library; None, after a warning, where it cannot be built."""
    library = build_or_warn(Path(__file__).with_suffix(".cpp"), "attention", "-ffp-contract=fast")
    if library is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.embtab_lanes.restype, library.embtab_lanes.argtypes = integer, []
    for name in ("embtab_attend", "embtab_attend_backward"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int32, [pointer, *[integer] * 3, *[pointer] * 3, *[integer] * 2]
    return library
