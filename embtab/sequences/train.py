"""One training of a study: stop on the validation split, measure on the test split."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from embtab.compare.statistics import resampled_auc
from embtab.compare.train import MeasuredTask
from embtab.datasets.schema import Dataset
from embtab.files import scratch
from embtab.models import DARE, DIN
from embtab.planning import Plan, plan
from embtab.sequences.study import Cell, Study
from embtab.sizes import parse_bytes
from embtab.threads import one_thread
from embtab.training.checkpoint import WholeFiles
from embtab.training.data import DataModule
from embtab.training.layout import Layout
from embtab.training.progress import Progress
from embtab.training.search_quality import relevance_of, search_quality
from embtab.training.sequence_task import FitSequenceTask, used_features

SEARCHED = 20
"""Events of a history whose order counts in `search_ndcg`."""


class MeasuredSequenceTask(MeasuredTask, FitSequenceTask):
    """A `FitSequenceTask` whose tables are as they are served; it keeps what it predicted on the test split."""


def make_task(study: Study, cell: Cell) -> MeasuredSequenceTask:
    """The task of a cell; its tables take no more than the budget together.

    Raises:
        InfeasibleBudget: when they cannot.
        UserError: for settings that fit neither each other nor the data.
    """
    tables, attention = _settings(study, cell)
    return MeasuredSequenceTask(
        study.data,
        **tables,
        attention=attention,
        leave_out=list(study.leave_out),
        table_optimizer=study.table_optimizer,
        table_lr=study.table_lr,
        init_std=study.init_std,
        lr=study.lr,
        weight_decay=study.weight_decay,
        l2=study.l2,
        model=cell.arm.made(),
    )


def make_plans(study: Study, cell: Cell) -> list[Plan]:
    """The plans of a cell's tables alone: the representation's, and the attention's where it has its own.

    Raises:
        InfeasibleBudget: when they cannot fit the budget.
        UserError: for settings that make no sense.
    """
    tables, attention = _settings(study, cell)
    features = used_features(study.data, study.leave_out)
    plans = [plan(features, **tables)]
    if attention is not None:
        events = Layout.of(features).events
        settings = {"dim": cell.arm.dim, "seed": cell.seed, **attention}
        settings.pop("init_std", None)
        plans.append(plan([feature for feature in features if feature.name in events], **settings))
    return plans


def _settings(study: Study, cell: Cell) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Settings of the representation's tables, and of the attention's where it has its own."""
    total = cell_bytes(study, cell)
    own = {"dim": cell.arm.dim, "seed": cell.seed}
    if cell.arm.attention is None:
        return {"method": cell.method, "budget": total, **own}, None
    attention = dict(cell.arm.attention)
    share = attention.pop("share", 0.5)
    part = None if total is None else int(total * share)
    rest = None if total is None or part is None else total - part
    return {"method": cell.method, "budget": rest, **own}, {"method": cell.method, "budget": part, **attention}


def cell_bytes(study: Study, cell: Cell) -> int | None:
    """The budget in bytes, of all tables together; the same for every arm of a study."""
    if cell.budget is None:
        return None
    dense = plan(used_features(study.data, study.leave_out), "dense", None, study.dim)
    return parse_bytes(cell.budget, dense.nbytes)


@one_thread()
def train(study: Study, cell: Cell) -> dict[str, Any]:
    """Trains a cell and measures it.

    Returns:
        Bytes of the tables; the metrics of the test split at the best epoch of the validation split; val_auc of that
        epoch; epochs trained; auc_resampled, the test AUC on resamples of the rows, or users; search_ndcg, the NDCG@20
        of the attention's scores against what is known of the events' relevance (on the validation split: beside a
        test split with 99 negatives a target it is small); seconds of it all.

    Raises:
        UserError: as `make_task`, and for a loss that is not finite.
    """
    L.seed_everything(cell.seed, workers=True, verbose=False)
    started = time.perf_counter()
    task, data = make_task(study, cell), DataModule(study.data, study.batch_size, seed=cell.seed)
    with scratch() as folder:
        best = ModelCheckpoint(folder, filename="best", monitor="val/auc", mode="max")
        trainer = L.Trainer(
            max_epochs=study.epochs,
            accelerator="cpu" if not torch.cuda.is_available() else "gpu",
            devices=1,
            callbacks=[best, EarlyStopping("val/auc", mode="max", patience=study.patience), Progress()],
            plugins=[WholeFiles()],
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(task, data)
        task.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        found: dict[str, Any] = {"val_auc": float(best.best_model_score or 0), "epochs": trainer.current_epoch}
    for tables in task.collections().values():
        tables.round_to_served()
    (tested,) = trainer.test(task, data, verbose=False)
    found |= {name.removeprefix("test/"): value for name, value in tested.items()}
    logits, labels, users, _ = task.tested
    found["auc_resampled"] = [round(value, 7) for value in resampled_auc(labels, logits, users).tolist()]
    if isinstance(task.model, DIN | DARE) and (known := relevance_of(Dataset.load(study.data))):
        found["search_ndcg"] = search_quality(task, study.data, "valid", SEARCHED, relevance=known)
    return found | table_bytes(task) | {"seconds": time.perf_counter() - started}


def table_bytes(task: FitSequenceTask) -> dict[str, int]:
    """Serving bytes of the attention's own tables, of the others, and of both."""
    attention = 0 if task.attention is None else task.attention.plan.nbytes
    representation: int = task.tables.plan.nbytes  # type: ignore[union-attr,assignment]
    return {"attention_bytes": attention, "nbytes": attention + representation}
