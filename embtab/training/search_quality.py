"""How well a model's attention finds what matters: NDCG of its scores against the events' relevance.

The relevance is *planted* where the data was generated with it. Of a log it is estimated, as the mutual information
between a click and what the history holds, by categories (Feng et al., ICLR 2025, arXiv 2410.02604, whose estimate
also tells positions apart; logs of moderate size hold too few events for that).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embtab.datasets.parquet import read_columns, row_groups
from embtab.datasets.reader import Batch, ParquetBatches
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.training.metrics import ndcg
from embtab.training.sequence_task import SequenceTask

PLANTED, INFORMATION = "planted", "mutual-information"
Floats = NDArray[np.float64]


def relevance_of(dataset: Dataset) -> str | None:
    """The relevance that a dataset gives: PLANTED, INFORMATION (where it has categories), or None."""
    if "relevance" in dataset.unread:
        return PLANTED
    return INFORMATION if "history_category" in {feature.name for feature in dataset.features} else None


def search_quality(
    task: SequenceTask,
    folder: str | Path,
    split: str = "test",
    k: int | None = None,
    batch_size: int = 512,
    relevance: str = PLANTED,
) -> float:
    """The mean over rows of the NDCG@k of the events' attention scores against their relevance.

    Rows without a relevant event are left out. Random scores do not give 0: compare with them.

    Args:
        task: a trained DIN or DARE.
        folder: a dataset folder; for PLANTED with an unread column "relevance", as `embtab prepare sequences
            --generate` makes it; for INFORMATION with the features "category" and "history_category".
        split: the rows to measure.
        k: events that count; all of them if None.
        batch_size: rows scored at a time.
        relevance: PLANTED or INFORMATION.

    Raises:
        UserError: when the dataset does not give the relevance, or the model gives no scores.
    """
    dataset = Dataset.load(folder)
    if relevance == PLANTED and "relevance" not in dataset.unread:
        raise UserError(f"{folder}: has no column 'relevance'; generated histories have it")
    known = mutual_information(folder) if relevance == INFORMATION else None
    was_training = task.training
    task.eval()
    scores, gains, lengths = [], [], []
    for batch in ParquetBatches(folder, split, batch_size, rank=0, world_size=1):
        scores.append(task.scores(batch.to(task.device)).cpu().numpy())
        lengths.append(batch.sparse["history_item"].lengths().cpu().numpy())
        if known is not None:
            targets, events = _categories(batch)
            gains.append(known[np.repeat(targets, lengths[-1]), events])
    task.train(was_training)
    if known is None:
        gains = list(_planted(Path(folder), dataset, split))
    sizes = np.concatenate(lengths)
    return ndcg(np.concatenate(gains), np.concatenate(scores), np.repeat(np.arange(len(sizes)), sizes), k)


def mutual_information(folder: str | Path, split: str = "train") -> Floats:
    """How much a category in the history says about a click on a target of a category.

    Args:
        folder: a dataset folder with the features "category" and "history_category".
        split: the rows to count.

    Returns:
        float64 [C, C], nats: at [t, c] the mutual information of two facts about rows whose target is of category t:
        whether the row is a click, and whether its history holds an event of category c.

    Raises:
        UserError: when the dataset has no categories.
    """
    sizes = {feature.name: feature.num_ids for feature in Dataset.load(folder).features}
    if "history_category" not in sizes:
        raise UserError(f"{folder}: has no feature 'history_category', so events have no estimated relevance")
    size = sizes["history_category"]
    rows, held = np.zeros((2, size)), np.zeros((2, size * size))
    for batch in ParquetBatches(folder, split, 8192, rank=0, world_size=1):
        targets, events = _categories(batch)
        clicks = batch.label.numpy().astype(np.int64)
        owner = np.repeat(np.arange(len(batch)), batch.sparse["history_category"].lengths().numpy())
        owner, events = np.divmod(np.unique(owner * size + events), size)  # each category once a row
        for click in (0, 1):
            rows[click] += np.bincount(targets[clicks == click], minlength=size)
            pairs = (targets[owner] * size + events)[clicks[owner] == click]
            held[click] += np.bincount(pairs, minlength=size * size)
    return information(held.reshape(2, size, size), rows[:, :, None] - held.reshape(2, size, size))


def information(present: Floats, absent: Floats) -> Floats:
    """Mutual information [...] in nats of two yes-or-no facts from their counts, both [2, ...]; 0 without any count."""
    counts = np.stack([present, absent])
    total = np.maximum(counts.sum((0, 1)), 1)
    chance = counts.sum(0, keepdims=True) * counts.sum(1, keepdims=True) / total
    ratio = np.divide(counts, chance, out=np.ones_like(counts), where=counts > 0)
    found: Floats = np.maximum((counts * np.log(ratio)).sum((0, 1)) / total, 0)  # never below by rounding
    return found


def _categories(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The category of each target, and of each event."""
    return batch.sparse["category"].values().cpu().numpy(), batch.sparse["history_category"].values().cpu().numpy()


def _planted(folder: Path, dataset: Dataset, split: str) -> Iterator[NDArray]:
    for group in row_groups(folder, dataset, split):
        for chunk in read_columns(group, ["relevance"])["relevance"].chunks:
            yield chunk.flatten().to_numpy()
