"""What is learnt: click probability from embeddings and numeric values, by binary cross entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from embtab.datasets.reader import Batch
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.features import read_features
from embtab.fused import Optimizer, outer_parameters, with_tables
from embtab.models.autoint import AutoInt
from embtab.planning import Plan, plan
from embtab.tables import EmbeddingBagCollection
from embtab.tables.base import Collection
from embtab.training import metrics
from embtab.training.best import only_plain_paths
from embtab.training.checkpoint import check_data, described, description
from embtab.training.contract import TableContract
from embtab.training.culprit import REMEDY, culprit, not_finite
from embtab.training.data import DataModule
from embtab.training.schedule import Schedule
from embtab.training.served import ServedRows

Rows = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.int64] | None]
"""Logits, labels, users and numbers of some rows."""


class RankingTask(L.LightningModule):
    """Trains embedding tables and a ranker together; measures AUC, log loss, normalised entropy and calibration.

    The dense parameters are trained by Adam; tables whose optimizer is fused into backward update themselves. One
    schedule drives the learning rates of both. Validation measures the rows as they are trained; test and prediction
    read them as they are served, in the plan's precision, and training may go on after them as if they had not been.

    Args:
        tables: a module KeyedJaggedTensor -> KeyedTensor, such as `EmbeddingBagCollection` or torchrec's.
        model: a module (dense [B, N], embeddings [B, C, D]) -> logits [B].
        lr: Adam's learning rate for the dense parameters.
        weight_decay: Adam's weight decay for them.
        schedule: of all learning rates; constant if None.

    Raises:
        UserError: for a learning rate or a weight decay below zero.
    """

    def __init__(
        self,
        tables: nn.Module,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
    ):
        super().__init__()
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be a number from 0 on, got {value}")
        self.tables = tables
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule or Schedule()
        self.about: dict[str, Any] = {}
        """More about this run for the checkpoint; plain JSON types only."""
        self.other_data = False
        """Whether checkpoints of other data are taken: those whose ids mean the same values."""
        self._seen: list[Rows] = []
        self._random_state: Tensor | None = None

    def collections(self) -> Mapping[str, Collection]:
        """The tables of embtab by name; none where the tables are another library's."""
        return {"tables": self.tables} if isinstance(self.tables, Collection) else {}

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B] of a click."""
        names = batch.sparse.keys()
        pooled = self.tables(batch.sparse)
        # By name, since a sharded collection may answer in another order.
        vectors = pooled.values() if pooled.keys() == names else torch.cat([pooled[name] for name in names], dim=1)
        logits: Tensor = self.model(batch.dense, vectors.unflatten(1, (len(names), -1)))
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Lets adaptive tables reorganise themselves, before a batch: a checkpoint is made after one, so a resumed run
        does it exactly once, and nothing moves between the last epoch's training and its evaluation.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # once a step of the optimizer
            epoch = self.current_epoch if batch_idx == 0 and self.current_epoch > 0 else None
            for collection in self.collections().values():
                collection.adapt(self.global_step, epoch)

    def loss(self, batch: Batch) -> Tensor:
        """What training makes small."""
        return F.binary_cross_entropy_with_logits(self(batch), batch.label)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch: its mean binary cross entropy in nats, and what a subclass adds to it.

        Raises:
            UserError: when it is not finite; it names the column, feature or weight that is to blame.
        """
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {loss.item()} at step {self.global_step} (epoch {self.current_epoch}): "
                f"{self._culprit(batch)}; {REMEDY}"
            )
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> Any:
        """Adam for the parameters outside of fused tables, joined with the optimizers of these; and the schedule.

        Raises:
            UserError: when the schedule needs the length of training, and the Trainer has none.
        """
        adam = torch.optim.Adam(outer_parameters(self), lr=self.lr, weight_decay=self.weight_decay)
        optimizer = with_tables(adam, self)
        if self.schedule == Schedule():
            return optimizer
        total = self.trainer.estimated_stepping_batches if self.schedule.needs_total else math.inf
        scheduler = self.schedule.of(optimizer, math.inf if total < 0 else total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps logits, labels and users for the end of the epoch."""
        self._keep(batch)

    def configure_callbacks(self) -> list[L.Callback]:
        """The check of the Trainer, and what makes tests and predictions read rows as they are served; a subclass that
        has callbacks of its own adds them to these.
        """
        return [TableContract(), ServedRows()]

    def on_validation_epoch_start(self) -> None:
        """Forgets the rows of a validation that was interrupted."""
        self._seen = []

    def on_test_epoch_start(self) -> None:
        """Forgets the rows of a test that was interrupted."""
        self._seen = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps logits, labels and users for the end of the epoch."""
        self._keep(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities [B] of a click, from rows as they are served."""
        return torch.sigmoid(self(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs val/auc, val/logloss, val/ne, val/calibration, and val/gauc where the data names users."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs test/auc, test/logloss, test/ne, test/calibration, and test/gauc where the data names users."""
        self._log_metrics("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the entry "embtab": the plan, `about`, versions and the random state, all as plain types.

        Raises:
            UserError: when a table or weight is not finite, so that the last good checkpoint stays.
        """
        mine = not_finite(checkpoint.get("state_dict", {}))
        wrong = next((name for name in gathered([mine]) if name is not None), None)  # all stop, or none does
        if wrong is not None:
            raise UserError(
                f"{wrong} is not finite after step {self.global_step - 1} (epoch {self.current_epoch}), so the last "
                f"checkpoint stays and no other is made; {REMEDY}"
            )
        checkpoint["embtab"] = description(self._plan(), {**self._data(), **self.about})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint was made with the same plan, of the same data, and names no files but its own.

        Raises:
            UserError: when it was not, or is not a checkpoint of this task.
        """
        entry = described(checkpoint)
        mine = self._plan()
        if mine is not None and entry["plan"] != mine.to_dict():
            raise UserError(
                "the checkpoint was made with another plan than this configuration gives (features, method, budget, "
                "dim or seed differ); use the configuration it was made with"
            )
        if not self.other_data:
            fingerprint = {**self._data(), **self.about}.get("fingerprint")
            check_data(entry["about"], fingerprint, "set other_data (--other_data true)")
        # without a Trainer no callback takes the paths up
        read_from = None if self._trainer is None else self.trainer.ckpt_path
        only_plain_paths(checkpoint.get("callbacks"), read_from)
        self._random_state = entry["random_state"]

    def on_train_start(self) -> None:
        """Continues the random numbers (of dropout) where a resumed run had left them."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
            self._random_state = None

    @torch.no_grad()
    def _culprit(self, batch: Batch) -> str:
        """What made the loss of a batch infinite or NaN."""
        vectors: dict[str, Tensor] = {}
        if not dist.is_initialized():  # else all processes would have to look
            given = self.tables.eval()(batch.sparse)  # adaptive tables do not count it
            vectors = given.to_dict() if isinstance(given, KeyedTensor) else {k: v.values() for k, v in given.items()}
        return culprit(batch, self.about.get("dense", ()), vectors, self.model.state_dict())

    def _data(self) -> dict[str, str]:
        """What data the Trainer reads, where it is a `DataModule` of embtab's."""
        data = getattr(self._trainer, "datamodule", None)
        return (
            {"dataset": data.dataset.name, "fingerprint": data.dataset.fingerprint}
            if isinstance(data, DataModule)
            else {}
        )

    def _plan(self) -> Plan | None:
        found = getattr(self.tables, "plan", None)
        return found if isinstance(found, Plan) else None

    def _keep(self, batch: Batch) -> None:
        users, rows = (None if each is None else each.cpu().numpy() for each in (batch.user, batch.row))
        self._seen.append((self(batch).float().cpu().numpy(), batch.label.cpu().numpy(), users, rows))

    def _log_metrics(self, stage: str) -> None:
        logits, labels, users, rows = columns(gathered(self._seen))
        self._seen = []
        if rows is not None and self.trainer.world_size > 1:  # the ranks' shares are equal: the last row may be on some
            once = np.unique(rows, return_index=True)[1]
            logits, labels, users = logits[once], labels[once], None if users is None else users[once]
        found = metrics.evaluate(labels, logits, users)
        if labels.min() == labels.max():
            rank_zero_warn(
                f"all {len(labels)} rows of {stage} have the label {labels[0]:g}: {stage}/auc and {stage}/ne are not "
                "defined (nan), and nothing that monitors them can choose"
            )
        # The same on every process already: `sync_dist` only keeps Lightning from advising it.
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)


class FitTask(RankingTask):
    """A `RankingTask` made from a prepared dataset and plain settings, for configuration files.

    Args:
        data: the prepared dataset's folder; its features are planned.
        method: how tables are compressed: a name of `embtab.METHODS`, or what else `embtab.plan` takes.
        budget: serving bytes, such as "8MB" or "0.1x" (of the dense tables); no limit if null.
        dim: width of every embedding.
        seed: of the hashes.
        precision: of the served rows: fp32, fp16, int8 or int4; null for fp32, and for what method "auto" chooses.
            Training is in fp32; `test` measures rows as they are served.
        init_std: standard deviation of the entries of fresh vectors.
        backend: "fbgemm" trains tables inside backward by `table_optimizer`, and so does "native", compiled here and
            quicker on CPUs; "torch" trains them by Adam at `lr`.
        table_optimizer: "rowwise_adagrad", "adagrad" or "sgd"; not for the torch backend.
        table_lr: its learning rate.
        table_weight_decay: L2 penalty on the rows of a batch.
        table_max_gradient: largest entry of the gradient of a looked-up sum; no limit if null.
        lr: Adam's learning rate for the ranker and the tables' dense parts.
        weight_decay: Adam's weight decay.
        schedule: of all learning rates, such as {name: cosine, warmup_steps: 1000}; constant if null.
        compile_rows: compile the arithmetic from ids to rows, which gains with long bags and on GPUs.
        model: the ranker, made from (number of dense columns, number of features, dim).

    Raises:
        UserError: for settings that fit neither each other nor the data, or a compiler that is not there.
    """

    def __init__(
        self,
        data: str,
        method: str | dict[str, Any] = "dense",
        budget: int | str | None = None,
        dim: int = 16,
        seed: int = 0,
        precision: str | None = None,
        init_std: float = 0.01,
        backend: str = "fbgemm",
        table_optimizer: str = "rowwise_adagrad",
        table_lr: float = 0.05,
        table_weight_decay: float = 0.0,
        table_max_gradient: float | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        compile_rows: bool = False,
        model: Callable[[int, int, int], nn.Module] = AutoInt,
    ):
        dataset = Dataset.load(data)
        planned = plan(read_features(data), method, budget, dim, seed, precision)
        settings = Optimizer(
            table_optimizer, table_lr, weight_decay=table_weight_decay, max_gradient=table_max_gradient
        )
        optimizer = settings if backend != "torch" else None
        tables = EmbeddingBagCollection(planned, backend, optimizer, init_std)
        if compile_rows:
            tables.compile_rows()
        super().__init__(tables, model(len(dataset.dense), len(dataset.features), dim), lr, weight_decay, schedule)
        self.about = {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "dense": list(dataset.dense)}


def columns(seen: Sequence[Rows]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
    """Logits, labels, users and numbers of all rows; None for what is not known of all."""
    users = [each[2] for each in seen if each[2] is not None]
    rows = [each[3] for each in seen if each[3] is not None]
    return (
        np.concatenate([each[0] for each in seen]),
        np.concatenate([each[1] for each in seen]),
        np.concatenate(users) if len(users) == len(seen) else None,
        np.concatenate(rows) if len(rows) == len(seen) else None,
    )


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all ranks, in rank order, on every rank; the list itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, rows)
    return [row for part in by_rank for row in part]
