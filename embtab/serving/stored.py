"""Physical tables as a bundle stores them, stacked, and decoded where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.reader.packed_rows import Rows


@dataclass(frozen=True)
class Stored:
    """Rows [R, W] of stacked tables as a bundle stores them, with the scales and offsets [R] of integer rows."""

    rows: np.ndarray
    width: int
    scales: np.ndarray | None = None
    offsets: np.ndarray | None = None

    @classmethod
    def of(cls, tables: Sequence[np.ndarray | Rows]) -> Stored:
        """Tables of one width and precision, one after the other."""
        width = tables[0].shape[1]
        packed = [table for table in tables if isinstance(table, Rows)]
        if not packed:
            return cls(np.concatenate([np.asarray(table) for table in tables]), width)
        rows = np.concatenate([table.stored for table in packed])
        if packed[0].scales is None:
            return cls(rows, width)
        scales, offsets = ([getattr(table, name) for table in packed] for name in ("scales", "offsets"))
        return cls(rows, width, np.concatenate(scales), np.concatenate(offsets))


class StoredTable(nn.Module):
    """Reads rows, decoded: int64 [...] -> float32 [..., W]."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.width = stored.width
        self.is_scaled = stored.scales is not None
        for name in ("rows", "scales", "offsets"):
            array = getattr(stored, name)
            if array is not None:
                self.register_buffer(name, torch.from_numpy(array))

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [..., W]: rows [...], decoded."""
        stored = self.get_buffer("rows")
        read = F.embedding(rows, stored)
        if not self.is_scaled:
            return read.float()
        if read.shape[-1] < self.width:  # two numbers a byte, the low half first
            both = read.int()
            read = torch.stack([both & 15, both >> 4], dim=-1).flatten(-2)[..., : self.width]
        scales, offsets = (F.embedding(rows, self.get_buffer(name)[:, None]).float() for name in ("scales", "offsets"))
        return read.float() * scales + offsets
