"""Rows as they are served: float16, or 8- and 4-bit integers with a float16 scale and offset per row.

Row-wise affine quantisation: x is stored as q = round((x - offset) / scale), read back as q * scale + offset, where
offset is the smallest entry of the row and scale its range over 2^bits - 1. Both are rounded to float16 *before* q is
chosen, so that what is read back is the nearest the stored numbers allow; the error is at most half a scale, plus what
float16 takes from the offset's own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float16).max


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
    levels = 2**bits - 1
    low, high = rows.min(dim=1).values, rows.max(dim=1).values
    offsets = low.half()
    # From the rounded offset, so that the largest entry is still reached; a flat row gets scale 0 and q 0.
    scales = ((high - offsets.float()).clamp(min=0) / levels).half()
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
