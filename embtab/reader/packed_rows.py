"""Rows stored in fewer bytes than float32, decoded where they are read: NumPy only.

Row-wise affine integers: x = q * scale + offset with a float16 scale and a float16 offset per row, computed in float32.
Two 4-bit integers share a byte, the first of them in its low half; an odd width leaves the last high half zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Rows:
    """The rows [R, W] of a table in float16, int8 or int4, decoded to float32 when they are read.

    Indexed like an array by integers, by slices (which decode nothing yet) and, flattened, by places; whatever else a
    decoder does with it decodes the whole table.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self, stored: np.ndarray, width: int, scales: np.ndarray | None = None, offsets: np.ndarray | None = None
    ) -> None:
        self.stored, self.scales, self.offsets = stored, scales, offsets
        self.shape = (len(stored), width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return np.asarray(self)[key]
        stored = self.stored[key]
        scales = None if self.scales is None else self.scales[key]
        offsets = None if self.offsets is None else self.offsets[key]
        if isinstance(key, slice):
            return Rows(stored, self.shape[1], scales, offsets)
        return decoded_rows(stored, self.shape[1], scales, offsets)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(decoded_rows(self.stored, self.shape[1], self.scales, self.offsets), dtype)

    def reshape(self, *shape: Any) -> Any:
        """All numbers one after the other for -1, still undecoded; any other shape decodes."""
        return Flat(self) if shape == (-1,) else np.asarray(self).reshape(*shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


class Flat:
    """The numbers of a table, row after row, decoded where they are read."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        width = self.rows.shape[1]
        rows, back = np.unique(places // width, return_inverse=True)
        return self.rows[rows][back.reshape(places.shape), places % width]


def decoded_rows(stored: np.ndarray, width: int, scales: Any = None, offsets: Any = None) -> np.ndarray:
    """float32 [..., W] from stored rows: float16 as it is; integers as q * scale + offset, two per byte for int4.

    Args:
        stored: float16 [..., W], uint8 [..., W], or uint8 [..., ceil(W / 2)] whose low four bits come first.
        width: W.
        scales: float16 [...], or None for float16 rows.
        offsets: float16 [...], or None.
    """
    if scales is None:
        return stored.astype(np.float32)
    if stored.shape[-1] < width:
        both = np.stack([stored & 15, stored >> 4], axis=-1)
        stored = both.reshape(*stored.shape[:-1], 2 * stored.shape[-1])[..., :width]
    return (
        stored.astype(np.float32) * np.asarray(scales, np.float32)[..., None]
        + np.asarray(offsets, np.float32)[..., None]
    )
