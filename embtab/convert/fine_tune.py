"""Imported tables under the ranker that was trained on the dense ones: what they cost in AUC, and a little training
that wins some of it back.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import nn

from embtab.datasets.reader import ParquetBatches
from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.tables import EmbeddingBagCollection
from embtab.training import metrics
from embtab.training.data import DataModule
from embtab.training.progress import Progress
from embtab.training.task import RankingTask

BATCH = 4096


def auc_of(tables: nn.Module, model: nn.Module, data: Path, split: str = "test") -> float:
    """The AUC of a ranker on a split of a prepared dataset.

    Args:
        tables: KeyedJaggedTensor -> KeyedTensor.
        model: as `RankingTask` takes it.
        data: the dataset's folder.
        split: "train", "valid" or "test".

    Raises:
        UserError: when the data has not the features of the tables.
    """
    task = RankingTask(tables, model).eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in ParquetBatches(data, split, BATCH):
            logits.append(task(batch).numpy())
            labels.append(batch.label.numpy())
    return metrics.auc(np.concatenate(labels), np.concatenate(logits))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it Lightning keeps its tips, which do not apply here, to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            yield
    finally:
        logger.setLevel(level)


def fine_tuned(
    tables: EmbeddingBagCollection,
    model: nn.Module,
    data: Path,
    epochs: int,
    table_lr: float = 0.02,
    lr: float = 1e-3,
    seed: int = 0,
) -> EmbeddingBagCollection:
    """The tables after some training under a ranker that stays as it is, so that it needs no new release.

    Args:
        tables: where to start.
        model: the ranker that was trained on the dense tables.
        data: the dataset's folder.
        epochs: of its training split.
        table_lr: of the tables' row-wise Adagrad.
        lr: of Adam, for arrays such as projections.
        seed: of the order of rows.

    Raises:
        UserError: when the loss is not finite, or there is no epoch.
    """
    if epochs < 1:
        raise UserError(f"fine-tuning needs at least one epoch, got {epochs}")
    L.seed_everything(seed, workers=True, verbose=False)
    started = EmbeddingBagCollection(tables.plan, "fbgemm", Optimizer("rowwise_adagrad", table_lr), init_std=None)
    started.load_state_dict(tables.state_dict())
    task = RankingTask(started, copy.deepcopy(model).eval().requires_grad_(False), lr)
    with _quiet():
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            callbacks=[Progress()],
        )
        trainer.fit(task, DataModule(str(data), BATCH, seed=seed))
    started.round_to_served()
    return started.eval()
