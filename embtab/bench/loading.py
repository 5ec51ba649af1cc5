"""The reader of prepared data against pyarrow on the same columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embtab.bench.timing import Arm, Stopwatch
from embtab.datasets.reader import ParquetBatches
from embtab.datasets.schema import Dataset

PYARROW = "pyarrow"


def loader_arms(folder: Path, batch: int) -> tuple[dict[str, Arm], int]:
    """One turn reads the training split; the baseline makes batches of torch columns by pyarrow's `iter_batches`.

    Args:
        folder: a dataset folder.
        batch: rows.

    Returns:
        The arms, and the rows of a turn.
    """
    dataset = Dataset.load(folder)
    files = [folder / part.path for part in dataset.parts("train")]
    columns = [name for name in dataset.arrow_schema().names if name not in dataset.unread]

    def pyarrow(_: int, watch: Stopwatch) -> None:
        for file in files:
            for rows in pq.ParquetFile(file).iter_batches(batch, columns=columns):
                for column in rows.columns:
                    torch.from_numpy(_numbers(column))
        watch.lap()

    def ours(shuffle: bool) -> Arm:
        reader = ParquetBatches(folder, "train", batch, shuffle=shuffle)

        def turn(i: int, watch: Stopwatch) -> None:
            reader.set_epoch(i)
            for _ in reader:
                pass
            watch.lap()

        return turn

    return {PYARROW: pyarrow, "in order": ours(False), "shuffled": ours(True)}, dataset.rows("train")


def read_once(folder: Path, batch: int, name: str) -> None:
    """One turn of one arm."""
    loader_arms(folder, batch)[0][name](0, Stopwatch(torch.device("cpu")))


def _numbers(column: pa.Array) -> np.ndarray:
    """The numbers of a column, of all its lists if they are lists; a copy, as torch wants to write to its tensors."""
    return np.array((column.flatten() if pa.types.is_list(column.type) else column).to_numpy(zero_copy_only=True))
