"""Ids that training never saw: how often other splits hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embtab.datasets.parquet import read_columns, row_groups
from embtab.datasets.schema import Dataset
from embtab.features import read_features, vocabulary_path
from embtab.text import printable

_SHOWN = 5


def seen_counts(folder: Path) -> dict[str, NDArray[np.int64]]:
    """How often each id of a feature occurs in training, int64 [num_ids], for the features that have counts.

    The id that all rare and unknown values share has no meaning of its own: it counts as never seen.

    Raises:
        DataError: when the folder is no prepared dataset, or a vocabulary cannot be read.
    """
    counts = {feature.name: feature.counts for feature in read_features(folder) if feature.counts is not None}
    return {name: _without_shared(vocabulary_path(folder, name), known) for name, known in counts.items()}


def _without_shared(path: Path, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    with pq.ParquetFile(path) as file:
        if "value" not in file.schema_arrow.names or file.read(["value"])["value"][0].is_valid:
            return counts
    return np.concatenate([np.zeros(1, np.int64), counts[1:]])


def unseen_shares(folder: Path, split: str) -> dict[str, float]:
    """Of the ids of each feature in a split, the share that training never saw; nan where the split has none.

    Raises:
        DataError: when a file is absent, damaged or other than described, or the split is empty.
    """
    counts = seen_counts(folder)
    unseen, total = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for group in row_groups(folder, Dataset.load(folder), split):
        table = read_columns(group, list(counts))
        for name, known in counts.items():
            ids = _flat(table[name])
            seen = known[ids[(ids >= 0) & (ids < len(known))]]
            unseen[name] += len(ids) - int(np.count_nonzero(seen))
            total[name] += len(ids)
    return {name: unseen[name] / total[name] if total[name] else float("nan") for name in counts}


def _flat(column: pa.ChunkedArray) -> NDArray[np.int64]:
    chunks = (chunk.flatten() if pa.types.is_list(chunk.type) else chunk for chunk in column.chunks)
    return np.concatenate([np.empty(0, np.int64), *(chunk.to_numpy() for chunk in chunks)])


def drift_line(folder: Path, split: str) -> str:
    """What `unseen_shares` says, for people: the features with the largest shares, those without ids, the uncounted."""
    shares = unseen_shares(folder, split)
    empty = [name for name, share in shares.items() if np.isnan(share)]
    found = sorted((name for name, share in shares.items() if share > 0), key=lambda name: -shares[name])
    said = ", ".join(f"{name} {shares[name]:.2%}" for name in found[:_SHOWN]) or "none"
    more = f" and {len(found) - _SHOWN} more features" if len(found) > _SHOWN else ""
    absent = f"; no id at all: {', '.join(empty)}" if empty else ""
    unknown = [feature.name for feature in read_features(folder, counts=False) if feature.hashed]
    uncounted = f"; hashed, so not counted: {', '.join(unknown)}" if unknown else ""
    return printable(f"{split}: ids unseen or too rare in training: {said}{more}{absent}{uncounted}")
