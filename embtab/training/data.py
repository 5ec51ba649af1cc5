"""A prepared dataset as Lightning wants it; training resumes in the middle of an epoch where it was left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from embtab.datasets.epochs import Epochs
from embtab.datasets.parquet import row_groups
from embtab.datasets.reader import Batch, ParquetBatches
from embtab.datasets.schema import SPLITS, Dataset
from embtab.errors import UserError
from embtab.features import Feature, read_features


class DataModule(L.LightningDataModule):
    """Batches of a folder made by `embtab prepare`.

    Args:
        path: the folder.
        batch_size: rows per batch and process: N processes with B rows see the batches of one process with N * B.
        seed: of the shuffle of the training split.
        num_workers: processes that read; 0 reads with a thread of this one.
        predict_split: what `Trainer.predict` reads: "train", "valid" or "test".

    Attributes:
        dataset: the folder's description.
        features: its features, with counts.

    Raises:
        DataError: when the folder is no prepared dataset, or a file of it is damaged.
    """

    def __init__(
        self, path: str, batch_size: int = 4096, seed: int = 0, num_workers: int = 0, predict_split: str = "test"
    ):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}")
        if seed < 0:
            raise UserError(f"seed must be 0 or more, got {seed}")
        if predict_split not in SPLITS:
            raise UserError(f"unknown split {predict_split!r} to predict; splits are {', '.join(SPLITS)}")
        self.path = Path(path)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.predict_split = predict_split
        self.dataset: Dataset = Dataset.load(self.path)
        self.features: list[Feature] = read_features(self.path)
        for split in SPLITS:  # a damaged file is found here, before anything is trained or written
            if self.dataset.rows(split):
                row_groups(self.path, self.dataset, split)
        self._training: Epochs | None = None
        self._resume_from: dict[str, Any] = {}

    def train_dataloader(self) -> Epochs:
        """The training split, shuffled anew each epoch; in file order where the Trainer is to overfit some batches."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0
        self._training = Epochs(self._loader("train", shuffle=not overfits, every_row=False), self._batches_per_epoch)
        if self._resume_from:
            self._training.load_state_dict(self._resume_from)
            self._tell_trainer(self._training, self._resume_from["epoch"])
            self._resume_from = {}
        elif self.trainer is not None:  # loaders that are made anew in every epoch do not all begin with the first
            self._training.begin(self.trainer.current_epoch)
        return self._training

    def _tell_trainer(self, training: Epochs, epoch: int) -> None:
        """Lightning counts batches: with other processes, or another batch size, an epoch has more of them or fewer."""
        if self.trainer is None or not (training.done or training.epoch > epoch):
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        progress.is_last_batch = training.epoch > epoch
        shift = (training.done or len(training)) - progress.current.ready
        for count in ("ready", "started", "processed", "completed"):
            setattr(progress.current, count, getattr(progress.current, count) + shift)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the data. (Lightning also keeps the loader's state, but drops it at epoch ends.)"""
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next training loader continue there."""
        self._resume_from = state_dict

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split, every row of it."""
        return self._loader("valid")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split, every row of it."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The rows of `predict_split` in file order.

        A thread of this process reads them: each of several workers would have to decode all files to keep the order.
        On many processes, each has its piece of every batch; `Batch.row` says which rows.
        """
        return self._loader(self.predict_split, num_workers=0)

    def _loader(
        self, split: str, shuffle: bool = False, every_row: bool = True, num_workers: int | None = None
    ) -> DataLoader[Batch]:
        batches = ParquetBatches(
            self.path, split, self.batch_size, shuffle=shuffle, seed=self.seed, every_row=every_row
        )
        workers = self.num_workers if num_workers is None else num_workers
        # A generator of its own, so that starting an epoch draws nothing from the global one: a resumed run starts
        # its loaders at other moments, and must see the same random numbers all the same.
        return DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator())

    def _batches_per_epoch(self) -> float:
        """How many training batches the Trainer takes from an epoch; fewer than there are with limit_train_batches."""
        return float("inf") if self.trainer is None else self.trainer.num_training_batches
