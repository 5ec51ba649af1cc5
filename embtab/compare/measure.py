"""What is measured of a trained table beside the usual metrics: rare ids, calibration, collisions, latency."""

from __future__ import annotations

import statistics
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.datasets.drift import seen_counts
from embtab.datasets.reader import ParquetBatches
from embtab.hashing import mix64
from embtab.tables import EmbeddingBagCollection
from embtab.training import metrics

UNKNOWN = np.iinfo(np.int64).max
"""Rarity of a row none of whose ids has a count."""
MOST_IDS = 2_000_000
"""Collisions are not counted in larger id spaces."""
BLOCK = 8192


@lru_cache(maxsize=1)
def rarity(folder: str) -> NDArray[np.int64] | None:
    """Of every row of the test split, how often the rarest of its ids occurs in the training split.

    Args:
        folder: a prepared dataset.

    Returns:
        int64 [rows], or None where no feature has counts.
    """
    counts = seen_counts(Path(folder))
    if not counts:
        return None
    rows = []
    for batch in ParquetBatches(folder, "test", 65_536):
        rarest = np.full(len(batch), UNKNOWN)
        for name, seen in counts.items():
            bags = batch.sparse[name]
            row = np.repeat(np.arange(len(batch)), bags.lengths().numpy())
            np.minimum.at(rarest, row, seen[bags.values().numpy()])
        rows.append(rarest)
    return np.concatenate(rows)


def slices(labels: NDArray, logits: NDArray, rarest: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Quality on rows with an id never seen in training, on the rarer half of the others, and on the rest.

    Args:
        labels: [N], 0 or 1.
        logits: [N].
        rarest: [N], see `rarity`; rows without any count are in no slice.

    Returns:
        By slice "unseen", "rare", "frequent": its rows, auc and logloss, and for "rare" the largest count `up_to`.
    """
    seen = rarest[(rarest > 0) & (rarest < UNKNOWN)]
    middle = float(np.median(seen)) if len(seen) else 0.0
    chosen = {
        "unseen": rarest == 0,
        "rare": (rarest > 0) & (rarest <= middle),
        "frequent": (rarest > middle) & (rarest < UNKNOWN),
    }
    found = {
        name: {
            "rows": int(rows.sum()),
            "auc": metrics.auc(labels[rows], logits[rows]),
            "logloss": metrics.logloss(labels[rows], logits[rows]),
        }
        for name, rows in chosen.items()
    }
    found["rare"]["up_to"] = middle
    return found


def deciles(labels: NDArray, logits: NDArray) -> list[list[float]]:
    """Ten groups of equal size by predicted rate: mean predicted rate, observed rate, rows of each."""
    order = np.argsort(logits, kind="stable")
    predicted = metrics.sigmoid(logits)
    groups = (group for group in np.array_split(order, 10) if len(group))
    return [[float(predicted[group].mean()), float(labels[group].mean()), len(group)] for group in groups]


@torch.inference_mode()
def collisions(tables: EmbeddingBagCollection) -> dict[str, list[int]]:
    """How many ids of every id space have the same vector as another id of it, so that no ranker can tell them apart.

    Args:
        tables: as they are served.

    Returns:
        [ids that share, ids] by id space; spaces of more than MOST_IDS ids, or of hashed ones, are left out.
    """
    numbered = [each for each in reversed(tables.plan.features) if each.num_ids <= MOST_IDS and not each.hashed]
    first = {feature.space: feature for feature in numbered}
    marks: dict[str, list[NDArray[np.int64]]] = {space: [] for space in first}
    wanted = {feature.name: feature.num_ids for feature in first.values()}
    sizes = {feature.name: wanted.get(feature.name, 0) for feature in tables.plan.features}
    at = {name: i for i, name in enumerate(sizes)}
    for start in range(0, max(sizes.values()), BLOCK):
        vectors = tables.vectors(_ids(sizes, start)).numpy()
        for space, feature in first.items():
            own = vectors[: max(feature.num_ids - start, 0), at[feature.name]]
            marks[space].append(_fingerprints(own))
    found = {}
    for space, blocks in marks.items():
        _, times = np.unique(np.concatenate(blocks), return_counts=True)
        found[space] = [int(times[times > 1].sum()), first[space].num_ids]
    return found


def _ids(sizes: dict[str, int], start: int) -> KeyedJaggedTensor:
    """Bags of one id each: ids from `start` on of every feature that has so many; empty bags for the others."""
    left = [max(min(size - start, BLOCK), 0) for size in sizes.values()]
    lengths = torch.zeros(len(sizes), max(left), dtype=torch.int64)
    for i, count in enumerate(left):
        lengths[i, :count] = 1
    values = torch.cat([torch.arange(start, start + count) for count in left])
    return KeyedJaggedTensor(list(sizes), values, lengths=lengths.flatten(), stride=max(left))


def _fingerprints(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """64 bits for each vector; equal vectors have equal ones, and others differ but for a chance of 2^-64."""
    bits = np.ascontiguousarray(vectors + np.float32(0)).view(np.int32)  # adding 0 makes a 0 of -0
    found = np.zeros(len(vectors), np.int64)
    for column in bits.T:
        found = mix64(found + column)
    return found


@torch.inference_mode()
def latency(tables: EmbeddingBagCollection, batch: KeyedJaggedTensor) -> float:
    """Microseconds to look a sample up, in a batch: the median of 3 to 15 repeats in 2 seconds, after 2 to warm up."""
    took: list[float] = []
    while len(took) < 5 or (len(took) < 17 and sum(took) < 2):
        started = time.perf_counter()
        tables(batch)
        took.append(time.perf_counter() - started)
    return statistics.median(took[2:]) / batch.stride() * 1e6


def torch_tables(tables: EmbeddingBagCollection) -> EmbeddingBagCollection:
    """A copy in the plain torch backend, ready to serve."""
    copy = EmbeddingBagCollection(tables.plan, backend="torch")
    state: dict[str, Any] = tables.state_dict()
    copy.load_state_dict(state)
    return copy.eval()
