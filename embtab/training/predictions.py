"""Predictions as a file: each row of the split once, in its order, whoever computed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from embtab.datasets.reader import Batch
from embtab.files import replaced_file
from embtab.training.data import DataModule
from embtab.training.task import gathered

FILE = "predictions.parquet"


class Predictions(L.Callback):
    """Writes what all processes predict to FILE in the run's folder, or in the working folder where there is none.

    Its columns are `row` (int64: the row's number in its split, counted from 0 in file order), the user column where
    the data names one, and `probability` (float32).

    Args:
        data: what is predicted.

    Attributes:
        path: the file, once it is written.
    """

    def __init__(self, data: DataModule) -> None:
        self.user = data.dataset.user
        self.path: Path | None = None
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets what an interrupted prediction left."""
        self._parts = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the rows of a batch."""
        columns = [batch.row, *([] if batch.user is None else [batch.user]), outputs.float()]
        self._parts.append(tuple(column.cpu().numpy() for column in columns if column is not None))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the rows of all processes in order; the first process writes them."""
        parts, folder = gathered(self._parts), trainer.log_dir  # which every process has to ask for
        self._parts = []
        if not trainer.is_global_zero:
            return
        row, *others = (np.concatenate(column) for column in zip(*parts, strict=True))
        row, once = np.unique(row, return_index=True)  # the last row fills up the shares of some processes
        names = ["row", *([] if len(others) == 1 else [self._user_name()]), "probability"]
        self.path = Path(folder or ".") / FILE
        with replaced_file(self.path) as beside:
            pq.write_table(pa.table([row, *(column[once] for column in others)], names), beside)

    def _user_name(self) -> str:
        assert self.user is not None
        return f"user_{self.user}" if self.user in ("row", "probability") else self.user
