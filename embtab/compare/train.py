"""One training of a sweep: stop on the validation split, measure on the test split."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from embtab.compare import measure
from embtab.compare.statistics import resampled_auc
from embtab.compare.sweep import Sweep
from embtab.files import scratch
from embtab.fused import Optimizer, outer_parameters
from embtab.planning import Plan
from embtab.tables import EmbeddingBagCollection
from embtab.threads import one_thread
from embtab.training import metrics
from embtab.training.checkpoint import WholeFiles
from embtab.training.data import DataModule
from embtab.training.progress import Progress
from embtab.training.served import ServedRows
from embtab.training.setup import make_model
from embtab.training.task import RankingTask, Rows, columns


class MeasuredTask(RankingTask):
    """A `RankingTask` of tables that are as they are served; it keeps what it predicted on the test split."""

    tested: Rows

    def configure_callbacks(self) -> list[L.Callback]:
        """All but the rounding: what is rounded would move again; validation and test are to see the same tables."""
        return [each for each in super().configure_callbacks() if not isinstance(each, ServedRows)]

    def on_test_epoch_end(self) -> None:
        """Keeps logits, labels and users."""
        self.tested = columns(self._seen)
        super().on_test_epoch_end()


@one_thread()
def train(sweep: Sweep, plans: Mapping[str, Plan], seed: int, show: bool = False) -> dict[str, dict[str, Any]]:
    """Trains tables once and measures them in each of their precisions.

    Args:
        sweep: the training settings.
        plans: the tables, by any names; they differ in precision alone.
        seed: of initial weights and shuffle.
        show: write the progress of training to stderr.

    Returns:
        By the same names: the metrics of the test split at the best epoch of the validation split; val_auc of that
        epoch; epochs and trained_samples; samples_per_s of training alone; training_nbytes of the tables; seconds of
        it all; and what `embtab.compare.measure` finds.

    Raises:
        UserError: for an unknown model or option, or a loss that is not finite.
    """
    quieten()
    L.seed_everything(seed, workers=True, verbose=False)
    data = DataModule(sweep.data, sweep.batch_size, seed=seed)
    tables = _tables(sweep, next(iter(plans.values())))
    model = make_model(sweep, len(data.dataset.dense), len(data.dataset.features))
    task = MeasuredTask(tables, model, lr=sweep.lr, weight_decay=sweep.weight_decay)
    task.about = {"dense": list(data.dataset.dense)}
    progress = Progress()
    if not show:
        progress.disable()
    with scratch() as folder:
        best = ModelCheckpoint(folder, filename="best", monitor="val/auc", mode="max")
        stop = EarlyStopping("val/auc", mode="max", patience=sweep.patience)
        trainer = make_trainer(sweep.epochs, [best, stop, progress])
        started = time.perf_counter()
        trainer.fit(task, data)
        run = {
            "epochs": trainer.current_epoch,
            "trained_samples": trainer.current_epoch * data.dataset.rows("train"),
            "training_nbytes": _training_nbytes(tables),
            "samples_per_s": float(trainer.callback_metrics["train/samples_per_s"]),
        }
        state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    found = {}
    for name, plan in plans.items():
        task.tables = served = tables if plan is tables.plan else _tables(sweep, plan)
        task.load_state_dict(state)
        served.round_to_served()
        found[name] = run | measured(task, trainer, data)
    seconds = time.perf_counter() - started
    return {name: row | {"seconds": seconds} for name, row in found.items()}


def _tables(sweep: Sweep, plan: Plan) -> EmbeddingBagCollection:
    optimizer = Optimizer(sweep.table_optimizer, sweep.table_lr)
    return EmbeddingBagCollection(plan, optimizer=optimizer, init_std=sweep.init_std)


def _training_nbytes(tables: EmbeddingBagCollection) -> int:
    """Bytes of rows, what their optimizer remembers, and further arrays, of which Adam keeps two numbers for each.

    Taken after training: some optimizers begin their memory with the first step.
    """
    parameters = sum(2 * each.numel() * each.element_size() for each in outer_parameters(tables))
    state = tables.lookup.state_dict() | tables.arrays.state_dict()
    return parameters + sum(each.numel() * each.element_size() for each in state.values())


def make_trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    """On one device, without logs."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu" if not torch.cuda.is_available() else "gpu",
        devices=1,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def measured(task: MeasuredTask, trainer: L.Trainer, data: DataModule) -> dict[str, Any]:
    """Everything about tables that are rounded to the precision they are served in: metrics of the test split, val_auc,
    and what `embtab.compare.measure` finds.
    """
    assert isinstance(task.tables, EmbeddingBagCollection)
    (validated,) = trainer.validate(task, data, verbose=False)
    trainer.test(task, data, verbose=False)
    logits, labels, users, _ = task.tested
    rarest = measure.rarity(str(data.path))
    served = measure.torch_tables(task.tables)
    return {
        **metrics.evaluate(labels, logits, users),
        "val_auc": validated["val/auc"],
        "auc_resampled": [round(value, 7) for value in resampled_auc(labels, logits, users).tolist()],
        "slices": None if rarest is None else measure.slices(labels, logits, rarest),
        "deciles": measure.deciles(labels, logits),
        "collisions": measure.collisions(served),
        "latency_us": measure.latency(served, next(iter(data.test_dataloader())).sparse),
    }


def quieten() -> None:
    """Lightning's tips, which do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
