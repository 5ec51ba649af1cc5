"""Decoded rows: Arrow columns as tensors from which batches are cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from embtab.datasets.schema import Dataset


@dataclass
class Bags:
    """One feature of a window: int64 values, and offsets [n + 1] unless every row has exactly one id."""

    values: Tensor
    offsets: Tensor | None

    def cut(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Values and int64 lengths of the rows [low, high)."""
        if self.offsets is None:
            return self.values[low:high], torch.ones(high - low, dtype=torch.int64)
        offsets = self.offsets[low : high + 1]
        return self.values[int(offsets[0]) : int(offsets[-1])], offsets.diff()


@dataclass
class Rows:
    """A decoded window of n rows: label [n], dense [n, D], one `Bags` per feature, user [n], row [n] where known."""

    label: Tensor
    dense: Tensor
    features: list[Bags]
    user: Tensor | None
    row: Tensor | None = None

    @classmethod
    def of(cls, tables: list[pa.Table], dataset: Dataset, order: np.ndarray | None) -> Rows:
        """The rows of null-free tables, one after the other; those at `order` (int64 [n]) alone where it is given."""
        table = pa.concat_tables(tables)
        dense = np.empty((len(table) if order is None else len(order), len(dataset.dense)), np.float32)
        for position, name in enumerate(dataset.dense):
            dense[:, position] = _flat(table[name], order)
        return cls(
            torch.from_numpy(_flat(table[dataset.label], order)),
            torch.from_numpy(dense),
            [_bags(table[feature.name], order) for feature in dataset.features],
            None if dataset.user is None else torch.from_numpy(_flat(table[dataset.user], order)),
        )


def _flat(column: pa.ChunkedArray, order: np.ndarray | None) -> np.ndarray:
    """An own, writable copy of a column of numbers."""
    joined = np.concatenate([chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks])
    return joined if order is None else joined[order]


def _bags(column: pa.ChunkedArray, order: np.ndarray | None) -> Bags:
    if not pa.types.is_list(column.type):
        return Bags(torch.from_numpy(_flat(column, order)), None)
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks])
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]).astype(np.int64)
    if order is not None:
        starts = (np.cumsum(lengths) - lengths)[order]
        lengths = lengths[order]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        values = values[np.repeat(starts, lengths) + within]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Bags(torch.from_numpy(values), torch.from_numpy(offsets))
