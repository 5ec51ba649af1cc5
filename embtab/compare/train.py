"""One cell of a sweep: train, stop on the validation split, measure on the test split."""

from __future__ import annotations

import inspect
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import embtab.models
from embtab.collections import EmbeddingBagCollection
from embtab.compare.sweep import Sweep
from embtab.errors import UserError
from embtab.lookup import Optimizer
from embtab.planning import Plan
from embtab.training.data import DataModule
from embtab.training.progress import Progress
from embtab.training.task import RankingTask


def train(sweep: Sweep, plan: Plan, seed: int, show: bool = False) -> dict[str, Any]:
    """Trains one plan and measures it.

    Args:
        sweep: the training settings.
        plan: the tables.
        seed: of initial weights and shuffle.
        show: write the progress of training to stderr.

    Returns:
        auc, logloss, ne, calibration (and gauc where the data names users) on the test split at the best epoch of the
        validation split; val_auc of that epoch; epochs trained; samples_per_s of training alone; seconds of it all.

    Raises:
        UserError: for an unknown model or option, or a loss that is not finite.
    """
    _quieten()
    torch.set_num_threads(1)  # a result does not depend on how many runs share the machine
    L.seed_everything(seed, workers=True, verbose=False)
    data = DataModule(sweep.data, sweep.batch_size, seed=seed)
    tables = EmbeddingBagCollection(
        plan, optimizer=Optimizer(sweep.table_optimizer, sweep.table_lr), init_std=sweep.init_std
    )
    model = make_model(sweep, len(data.dataset.dense), len(plan.features))
    task = RankingTask(tables, model, lr=sweep.lr, weight_decay=sweep.weight_decay)
    progress = Progress()
    if not show:
        progress.disable()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(Path(folder), filename="best", monitor="val/auc", mode="max")
        stop = EarlyStopping("val/auc", mode="max", patience=sweep.patience)
        trainer = L.Trainer(
            max_epochs=sweep.epochs,
            accelerator="cpu" if not torch.cuda.is_available() else "gpu",
            devices=1,
            callbacks=[best, stop, progress],
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        started = time.perf_counter()
        trainer.fit(task, data)
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        task.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        tables.round_to_served()
        (tested,) = trainer.test(task, data, verbose=False)
    return {
        **{name.removeprefix("test/"): value for name, value in tested.items()},
        "val_auc": float(best.best_model_score or float("nan")),
        "epochs": trainer.current_epoch,
        "samples_per_s": measured["train/samples_per_s"],
        "seconds": time.perf_counter() - started,
    }


def make_model(sweep: Sweep, num_dense: int, num_features: int) -> torch.nn.Module:
    """The ranker by name, with only options it has.

    Raises:
        UserError: for an unknown name or option, or a value the ranker refuses.
    """
    options = dict(sweep.model)
    name = options.pop("name", None)
    classes = {
        key: value
        for key, value in vars(embtab.models).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and value not in embtab.models.SEQUENCE_MODELS
    }
    if name not in classes:
        raise UserError(f"unknown model {name!r}; there are {', '.join(classes)}")
    known = list(inspect.signature(classes[name]).parameters)[3:]
    for option in options:
        if option not in known:
            raise UserError(f"model {name} has no option {option!r}; it has {', '.join(known)}")
    return classes[name](num_dense, num_features, sweep.dim, **options)


def _quieten() -> None:
    """Lightning's tips, which do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
