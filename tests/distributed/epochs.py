"""What the processes of the tests run: training on a prepared dataset, stopped in mid-epoch. No test itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded import enter, strategy
from torch import Tensor, nn

import embtab as et
from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer
from embtab.errors import UserError

GROUPS = [[7, 64, 100], [1], [90, 33, 41]]  # row groups of the training files; 5.25 batches of 64
ROWS = sum(map(sum, GROUPS))
BATCH = 64  # over all processes
STOP = 3  # in the middle of the first of two epochs, which have 6 batches each


def write(folder: Path) -> Path:
    """One id a feature, so that no sum depends on who adds; the dense column names the row."""
    random = np.random.default_rng(5)
    dataset = Dataset("epochs", (Categorical("item", 500), Categorical("shop", 300)), dense=("row",))
    schema, first = dataset.arrow_schema(), 0
    for number, groups in enumerate(GROUPS):
        with open_writer(folder / "train" / f"part-{number:03}.parquet", schema) as writer:
            for rows in groups:
                columns = {
                    "label": random.integers(0, 2, rows).astype(np.float32),
                    "row": np.arange(first, first + rows, dtype=np.float32),
                    "item": random.zipf(1.3, rows) % 500,
                    "shop": random.integers(0, 300, rows),
                }
                table = pa.table([columns[name] for name in schema.names], schema=schema)
                writer.write_table(table, row_group_size=rows)
                first += rows
    replace(dataset, files=describe_files(folder)).save(folder)
    return folder


class Fixed(nn.Module):
    """A ranker that is not trained and whose logits depend on nothing but their row: tables can be compared bit by bit.

    Its one parameter keeps optimizer and DDP busy, and stays zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        flat = embeddings.flatten(1)
        return (flat * torch.arange(flat.shape[1]).cos()).sum(1) + self.zero


class Recorder(et.RankingTask):
    """Keeps the rows of this process's batches, and the loss over all processes."""

    def __init__(self, tables: nn.Module):
        super().__init__(tables, Fixed())
        self.rows: list[tuple[int, list[float]]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.losses.append(float(mean))
        self.rows.append((self.current_epoch, batch.dense[:, 0].tolist()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(folder: Path, name: str, optimizer: str, strategy: Any, world_size: int, steps: int = -1, resume: Any = None):
    """Trains two epochs, or so many steps; writes `name`-end.ckpt and, after STOP steps, `name`-mid.ckpt."""
    data = et.DataModule(str(folder / "data"), batch_size=BATCH // world_size)
    plan = et.plan(data.features, "hash", "0.7x", dim=8)
    torch.manual_seed(11 if resume is None else 12)
    recorder = Recorder(et.EmbeddingBagCollection(plan, optimizer=et.Optimizer(optimizer, 0.5), init_std=0.3))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_epochs=2,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename=f"{name}-mid", every_n_train_steps=STOP, save_top_k=1)],
    )
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{name}-end.ckpt")
    return recorder


def run(rank: int, world_size: int, port: int, folder: str, runs: list[dict[str, Any]]) -> None:
    """Trains some runs one after the other; every process writes the rows and losses that it saw."""
    enter(rank, world_size, port)
    for settings in runs:
        made = strategy(settings["strategy"], settings.get("pipeline", False))
        options = {key: value for key, value in settings.items() if key != "pipeline"}
        options |= {"strategy": made, "world_size": world_size}
        seen = train(Path(folder), **options)
        torch.save((seen.rows, seen.losses), Path(folder) / f"{settings['name']}-seen{rank}.pt")


def spoil(rank: int, world_size: int, port: int, folder: str) -> None:
    """Trains a little and writes a checkpoint; then NaN gets into what rank 1 holds of a table, and another is due."""
    enter(rank, world_size, port)
    seen = train(Path(folder), "spoilt", "sgd", strategy("row_wise"), world_size, steps=STOP)
    name, table = next(each for each in seen.state_dict().items() if hasattr(each[1], "local_shards"))
    if rank == 1:
        table.local_shards()[0].tensor[-1, -1] = float("nan")
    with pytest.raises(UserError, match="so the last checkpoint stays") as refused:
        seen.trainer.save_checkpoint(Path(folder) / "spoilt-end.ckpt")
    torch.save((name, str(refused.value)), Path(folder) / f"spoilt-said{rank}.pt")
