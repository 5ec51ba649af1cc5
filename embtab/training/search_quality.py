"""How well a model's attention finds what matters, where the data knows it: NDCG of scores against true relevance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embtab.datasets.parquet import read_columns, row_groups
from embtab.datasets.reader import ParquetBatches
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.training.metrics import ndcg
from embtab.training.sequence_task import SequenceTask


def search_quality(
    task: SequenceTask, folder: str | Path, split: str = "test", k: int | None = None, batch_size: int = 512
) -> float:
    """The mean over rows of the NDCG@k of the events' attention scores against their true relevance.

    Rows without a relevant event are left out. Random scores do not give 0: compare with them.

    Args:
        task: a trained DIN or DARE.
        folder: a dataset folder with an unread column "relevance", as `embtab prepare sequences --generate` makes it.
        split: the rows to measure.
        k: events that count; all of them if None.
        batch_size: rows scored at a time.

    Raises:
        UserError: when the dataset does not know the relevance, or the model gives no scores.
    """
    dataset = Dataset.load(folder)
    if "relevance" not in dataset.unread:
        raise UserError(f"{folder}: has no column 'relevance'; generated histories have it")
    was_training = task.training
    task.eval()
    batches = ParquetBatches(folder, split, batch_size, rank=0, world_size=1)
    scores = np.concatenate([task.scores(batch.to(task.device)).cpu().numpy() for batch in batches])
    task.train(was_training)
    relevance, lengths = (np.concatenate(each) for each in zip(*_relevance(Path(folder), dataset, split), strict=True))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return ndcg(relevance, scores, rows, k)


def _relevance(folder: Path, dataset: Dataset, split: str) -> Iterator[tuple[NDArray, NDArray]]:
    for group in row_groups(folder, dataset, split):
        for chunk in read_columns(group, ["relevance"])["relevance"].chunks:
            yield chunk.flatten().to_numpy(), np.diff(chunk.offsets.to_numpy())
