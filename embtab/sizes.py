"""Byte sizes as people write them: 8_000_000, "8MB" (10^6), "8MiB" (2^20), "0.1x" (of the dense table)."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import numpy as np

from embtab.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_BY_LOWER = {unit.lower(): size for unit, size in _UNITS.items()}
_NUMBERS = (int, float, np.integer, np.floating)
_PATTERN = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | float | str, dense_bytes: int | None = None) -> int:
    """The number of bytes that `size` means, rounded down to whole bytes.

    Args:
        size: a number of bytes, a string with a unit ("8MB" is 8,000,000; "8MiB" is 8,388,608), or a multiple of the
            dense table ("0.1x").
        dense_bytes: what "1x" means; without it a multiple is refused.

    Raises:
        UserError: when it is not a size, or not above zero.
    """
    if isinstance(size, str):
        found = _PATTERN.fullmatch(size)
        unit = found.group(2).lower() if found else "?"
        if unit == "x" and dense_bytes is not None:
            scale = dense_bytes
        elif unit in _BY_LOWER:
            scale = _BY_LOWER[unit]
        else:
            raise UserError(f'budget {size!r} is not a size; write bytes, "8MB", "8MiB" or "0.1x" (of the dense table)')
        assert found is not None
        nbytes = int(Decimal(found.group(1).replace("_", "")) * scale)
    elif isinstance(size, bool) or not isinstance(size, _NUMBERS) or not math.isfinite(size):
        raise UserError(f'budget {size!r} is not a size; write bytes, "8MB", "8MiB" or "0.1x" (of the dense table)')
    else:
        nbytes = int(size)
    if nbytes <= 0:
        raise UserError(f"budget {size!r} is {nbytes} bytes; it must be above zero")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """A size for people, in powers of ten: 8400000 -> "8.40 MB"."""
    if nbytes < 1000:
        return f"{nbytes} B"
    for power, unit in enumerate(("kB", "MB", "GB"), start=1):
        if nbytes < 999.5 * 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes / 1000**4:.3g} TB"
