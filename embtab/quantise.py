"""Rows as they are served: float16, or 8- and 4-bit integers with a float16 scale and offset per row.

Row-wise affine quantisation: x is stored as q = round((x - offset) / scale) and read back as q * scale + offset. The
offset is the smallest entry of the row, and the scale what is left of its range over 2^bits - 1. Both are rounded to
float16 *before* q is chosen, the offset down and the scale up, so that every entry lies between the ends of the grid:

    |error| <= scale / 2,    scale <= (largest - smallest entry + step(offset)) / (2^bits - 1) + step(scale)

where step is the distance between neighbouring float16 numbers: 2^-10 of the number or less, and never less than 2^-24.
(Float32 adds roundings of its own, some 2^-23 of the largest entry.) Where rounding both to the nearest instead gives a
row a smaller largest error, as it does for rows that come from such a grid already, the row is stored so.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float16).max
CHUNK = 2**16
"""Rows that are quantised in one go, so that what it takes beside them stays small."""


def quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of `bits` bits with a scale and an offset per row.

    Args:
        rows: float32 [R, W], finite, entries within float16.
        bits: 8 or 4.

    Returns:
        uint8 [R, W] (values below 2^bits; not packed), float16 [R] scales and float16 [R] offsets.

    Raises:
        ValueError: when an entry is not finite or beyond float16.
    """
    if not bool((rows.abs() <= _LARGEST).all()):  # also false for NaN
        raise ValueError(f"rows hold an entry that is not finite or beyond {_LARGEST:.0f}, the largest float16")
    q = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales, offsets = rows.new_empty(2, len(rows), dtype=torch.float16)
    for first in range(0, len(rows), CHUNK):
        part = slice(first, first + CHUNK)
        q[part], scales[part], offsets[part] = _better(rows[part], 2**bits - 1)
    return q, scales, offsets


def _better(rows: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row as the rounding stores it that has the smaller largest error."""
    low, high = rows.min(dim=1).values, rows.max(dim=1).values
    floor, nearest = _half_below(low), low.half()
    outward = _stored(rows, levels, -_half_below((floor.float() - high) / levels), floor)
    inward = _stored(rows, levels, ((high - nearest.float()).clamp(min=0) / levels).half(), nearest)
    worst = [(dequantise(*each) - rows).abs().amax(dim=1) for each in (outward, inward)]
    chosen = worst[0] <= worst[1]
    return (
        torch.where(chosen.unsqueeze(1), outward[0], inward[0]),
        torch.where(chosen, outward[1], inward[1]),
        torch.where(chosen, outward[2], inward[2]),
    )


def _half_below(x: Tensor) -> Tensor:
    """The largest float16 at or below each number."""
    near = x.half()
    return torch.where(near.float() > x, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)


def _stored(rows: Tensor, levels: int, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers that scales and offsets give; a scale of 0 gives q 0."""
    safe = torch.where(scales > 0, scales.float(), 1.0).unsqueeze(1)
    q = ((rows - offsets.float().unsqueeze(1)) / safe).round().clamp(0, levels)
    return torch.where(scales.unsqueeze(1) > 0, q, 0).to(torch.uint8), scales, offsets


def dequantise(q: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """float32 [R, W] from what `quantise` gave."""
    return q.float() * scales.float().unsqueeze(1) + offsets.float().unsqueeze(1)


def served(rows: Tensor, precision: str) -> Tensor:
    """float32 [R, W]: the values that serving reads once rows are stored in a precision ("fp32", "fp16", ...).

    Raises:
        ValueError: when an entry cannot be stored in that precision.
    """
    if precision == "fp32":
        return rows
    if precision == "fp16":
        if not bool((rows.abs() <= _LARGEST).all()):
            raise ValueError(f"rows hold an entry that is not finite or beyond {_LARGEST:.0f}, the largest float16")
        return rows.half().float()
    return dequantise(*quantise(rows, {"int8": 8, "int4": 4}[precision]))
