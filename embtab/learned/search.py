"""One search from its settings to tables that are physically smaller, measured and written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from embtab.bundle import save as save_bundle
from embtab.files import replaced_file, scratch, write_text
from embtab.learned.claim import claim, make_lab, options_of, settings_of
from embtab.learned.forms import compacted, plan_of
from embtab.learned.method import Found, Lab, tensors
from embtab.learned.registry import make
from embtab.learned.stages import State
from embtab.learned.supernet import Gate, Masked, joined
from embtab.learned.training import Training, measure
from embtab.planning import Plan
from embtab.planning.specs import MethodSpec
from embtab.tables import EmbeddingBagCollection
from embtab.text import csv_text
from embtab.threads import one_thread
from embtab.training.setup import TrainingSetup


@dataclass
class Result:
    """What a search came to.

    Args:
        plan: the shape; its bytes never exceed the budget.
        tables: with the values that serving reads, in the precision asked for.
        model: the ranker trained with them.
        metrics: auc, logloss, ne, calibration (and gauc) on the test split; val_auc; epochs of the last training.
        search_seconds: of everything before the last training: supernet, pruning, evolution.
        seconds: of all stages, the last training included; the dense reference is not.
        trained_samples: samples that all stages trained on.
        evaluated_samples: samples that all stages looked at to choose.
        samples_per_s: of training alone, in all stages.
        training_nbytes: the most bytes that tables, their optimizer's memory and the gate took in any stage.
        dense: the dense training that was given.
        archive: every shape that was measured; `pareto` says that none is both smaller and better.
    """

    plan: Plan
    tables: EmbeddingBagCollection
    model: torch.nn.Module
    metrics: dict[str, float]
    search_seconds: float
    seconds: float
    trained_samples: int
    evaluated_samples: int
    samples_per_s: float
    training_nbytes: int
    dense: Reference | None
    archive: list[dict[str, Any]]

    def cost(self) -> dict[str, Any]:
        """Seconds and samples; as multiples of the dense training too, where that was measured."""
        found: dict[str, Any] = {
            "search_seconds": self.search_seconds,
            "seconds": self.seconds,
            "trained_samples": self.trained_samples,
            "evaluated_samples": self.evaluated_samples,
            "training_nbytes": self.training_nbytes,
        }
        if self.dense is not None:
            found["dense_seconds"] = self.dense.seconds
            found["seconds_in_dense_trainings"] = self.seconds / self.dense.seconds
            found["samples_in_dense_trainings"] = self.trained_samples / self.dense.trained_samples
        return found


@dataclass(frozen=True)
class Reference:
    """One dense training, the unit that searches are paid in.

    Args:
        metrics: on the test split, of float32 rows.
        seconds: of the training.
        trained_samples: samples that it trained on.
    """

    metrics: dict[str, float]
    seconds: float
    trained_samples: int


@one_thread()
def train_dense(setup: TrainingSetup, seed: int = 0, folder: Path | None = None, title: str | None = None) -> Reference:
    """Trains dense tables with the settings of a search; the arguments are those of `run`."""
    with _place(folder) as place:
        lab = make_lab(setup, "dense", None, seed, "fp32", place, title)
        claim(lab, settings_of(lab, "dense", {}))
        training = Training(lab.setup, lab.data, Gate(), lab.seed)
        state = lab.trained("dense", training, setup.epochs, setup.patience)
        tested = lab.stages.run("test", lambda save, resumed: dict(training.evaluate("test")))
    return Reference(tested, state["cost"]["seconds"], state["cost"]["trained"])


@one_thread()
def run(
    setup: TrainingSetup,
    method: MethodSpec,
    budget: int | float | str,
    seed: int = 0,
    precision: str = "fp32",
    folder: Path | None = None,
    title: str | None = None,
    dense: Reference | None = None,
) -> Result:
    """Searches, retrains, and measures what will be served.

    Args:
        setup: the settings of training: data, dim, model, epochs, ...; its methods, budgets and seeds are not used.
        method: a name of `embtab.learned.LEARNED`, or {"name": ..., options}.
        budget: serving bytes: 8_000_000, "8MB", "0.1x" (of the dense tables).
        seed: of everything drawn.
        precision: of the served rows; the search counts bytes in it.
        folder: where stages and artefacts are kept, so that a second call goes on from the first; none if None.
        title: of the progress on stderr; silent if None.
        dense: a dense training of the same settings, to state the cost in multiples of it.

    Raises:
        InfeasibleBudget: when the method's smallest shape does not fit.
        UserError: for settings that make no sense, data that lacks what the method needs, or a folder that holds
            another search.
    """
    learned = make(method)
    with _place(folder) as place:
        lab = make_lab(setup, learned.name, budget, seed, precision, place, title, learned.check)
        claim(lab, settings_of(lab, learned.name, options_of(learned)))
        found = learned.search(lab)
        training, plan, tables = _served(lab, found)
        result = _measured(lab, training, plan, tables, dense)
        if folder is not None:
            _write(folder, lab, found, result)
    return result


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that vanishes."""
    if folder is not None:
        yield folder
        return
    with scratch() as place:
        yield place


def _served(lab: Lab, found: Found) -> tuple[Training, Plan, EmbeddingBagCollection]:
    """Trains with the mask as it is, and gives the tables that are left of it."""
    training = Training(lab.setup, lab.data, Masked(joined(found.masks)), lab.seed)
    if found.start is not None:
        training.load_weights(_without_gate(found.start))
        training.keep_start = True
    epochs = lab.setup.epochs if found.retrain else 0
    lab.trained("retrain", training, epochs, lab.setup.patience)
    plan = plan_of(lab.data.features, found.masks, lab.spec, lab.budget)
    if plan.nbytes > lab.budget:
        raise AssertionError(f"found {plan.nbytes} bytes for a budget of {lab.budget}; please report this")
    rows = {name: each.cpu() for name, each in training.tables.rows().items()}
    tables = compacted(plan, found.masks, rows)
    tables.round_to_served()
    return training, plan, tables.to(lab.data.device)


def _without_gate(start: State) -> State:
    return start | {"tables": {k: value for k, value in start["tables"].items() if not k.startswith("gate.")}}


def _measured(
    lab: Lab, training: Training, plan: Plan, tables: EmbeddingBagCollection, dense: Reference | None
) -> Result:
    """The test split, and what it all cost."""
    metrics = measure(tables, training.model, lab.data, "test")
    metrics |= {"val_auc": max(each["auc"] for each in training.history), "epochs": training.epoch}
    costs = {name: state["cost"] for name, state in lab.stages.done.items() if "cost" in state}
    trained = sum(cost["trained"] for cost in costs.values())
    lab.archive.append(
        {"stage": "retrain", "nbytes": plan.nbytes, "auc": metrics["val_auc"]}
        | {"logloss": min(training.history, key=lambda each: -each["auc"])["logloss"]}
    )
    return Result(
        plan,
        tables,
        training.model,
        metrics,
        search_seconds=sum(cost["seconds"] for name, cost in costs.items() if name != "retrain"),
        seconds=sum(cost["seconds"] for cost in costs.values()),
        trained_samples=trained,
        evaluated_samples=sum(cost["evaluated"] for cost in costs.values()),
        samples_per_s=trained / sum(cost["training_seconds"] for cost in costs.values()),
        training_nbytes=lab.peak,
        dense=dense,
        archive=with_pareto(lab.archive),
    )


def with_pareto(archive: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The archive with `pareto`: no other shape has at most the bytes and a higher auc, or fewer and no lower one."""

    def beaten(one: Mapping[str, Any]) -> bool:
        return any(
            other["nbytes"] <= one["nbytes"]
            and other["auc"] >= one["auc"]
            and (other["nbytes"] < one["nbytes"] or other["auc"] > one["auc"])
            for other in archive
        )

    return [{**each, "pareto": not beaten(each)} for each in archive]


def _write(folder: Path, lab: Lab, found: Found, result: Result) -> None:
    """The artefacts. All but cost.json and the bundle's date are the same, byte for byte, for the same settings."""
    with replaced_file(folder / "masks.safetensors") as beside:
        beside.write_bytes(save(tensors(found.masks)))
    write_text(folder / "plan.json", _json(result.plan.to_dict()))
    write_text(folder / "archive.json", _json(result.archive))
    write_text(folder / "archive.csv", _csv(result.archive))
    write_text(folder / "cost.json", _json(result.cost()))
    dense = None if result.dense is None else result.dense.metrics
    about = {"nbytes": result.plan.nbytes, "budget": lab.budget, "dense_nbytes": result.plan.dense_nbytes}
    write_text(folder / "result.json", _json(about | {"metrics": result.metrics, "dense": dense, "found": found.about}))
    save_bundle(
        result.tables,
        folder / "bundle",
        quality=result.metrics,
        provenance={"dataset": lab.data.dataset.name, "fingerprint": lab.data.dataset.fingerprint},
        overwrite=True,
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    printed = [{name: json.dumps(v) if isinstance(v, dict) else v for name, v in row.items()} for row in rows]
    return csv_text(columns, printed)
