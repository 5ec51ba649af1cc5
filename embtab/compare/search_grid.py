"""Searches for methods x budgets x precisions x seeds, each in a folder of its own, and what came out as one table."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embtab.compare.sweep import Cell, Sweep
from embtab.datasets.schema import Dataset
from embtab.errors import InfeasibleBudget, UserError
from embtab.files import locked, write_text
from embtab.fused import Optimizer
from embtab.learned.registry import make
from embtab.learned.search import Reference, run, train_dense
from embtab.planning.specs import label
from embtab.sizes import format_bytes
from embtab.text import csv_text, markdown_row
from embtab.text import markdown as md
from embtab.training.setup import check_training, make_model

COLUMNS = (
    *("method", "budget", "precision", "seed", "status", "nbytes", "dense_nbytes", "auc", "dense_auc", "val_auc"),
    *("logloss", "search_seconds", "seconds", "seconds_in_dense_trainings", "samples_in_dense_trainings"),
    *("training_nbytes", "folder"),
)


def search(sweep: Sweep, out: Path) -> str:
    """Runs every search of a sweep that is not done, and writes results.csv and report.md.

    Args:
        sweep: learned methods, budgets, precisions and seeds, and the settings of training.
        out: a folder per search, one per dense training, and the report; a second call goes on from the first.

    Returns:
        The report as Markdown.

    Raises:
        InfeasibleBudget: when no search is feasible.
        UserError: for settings that make no sense, or when another process writes to `out`.
    """
    _check(sweep)
    rows: list[dict[str, Any]] = []
    refused: InfeasibleBudget | None = None
    with locked(out):
        for i, cell in enumerate(_cells(sweep), start=1):
            dense = train_dense(sweep, cell.seed, out / f"dense-seed{cell.seed}", f"dense seed {cell.seed}")
            folder = out / slug(cell)
            print(f"search {i} of {len(_cells(sweep))}: {cell.name}", file=sys.stderr, flush=True)
            try:
                rows.append(_row(sweep, cell, dense, folder))
            except InfeasibleBudget as error:
                refused = error
                rows.append(_place(cell, folder) | {"status": f"infeasible: needs {error.min_bytes} bytes"})
            write_text(out / "results.csv", csv_text(COLUMNS, rows))
        report = markdown(sweep, rows)
        write_text(out / "report.md", report)
    if refused is not None and all(row["status"] != "ok" for row in rows):
        raise refused
    return report


def _check(sweep: Sweep) -> None:
    """Refuses, before a folder is made, what no search can start with."""
    if not isinstance(sweep.model, Mapping):
        raise UserError("embtab search takes one model; write one file for each")
    for method in sweep.methods:
        make(method)
    dataset = Dataset.load(Path(sweep.data))
    make_model(sweep, len(dataset.dense), len(dataset.features))
    check_training(sweep.seeds, lr=sweep.lr, weight_decay=sweep.weight_decay, init_std=sweep.init_std)
    Optimizer(sweep.table_optimizer, sweep.table_lr)


def _cells(sweep: Sweep) -> list[Cell]:
    """Every search, seed by seed."""
    return [
        Cell(method, budget, precision, seed)
        for seed in sweep.seeds
        for precision in sweep.precisions
        for method in sweep.methods
        for budget in sweep.budgets
    ]


def slug(cell: Cell) -> str:
    """A search's folder: "optembed_epochs=4-0.1x-fp32-seed0"."""
    name = re.sub(r"[^\w.=]+", "_", label(cell.method))
    return f"{name}-{cell.budget}-{cell.precision}-seed{cell.seed}"


def _place(cell: Cell, folder: Path) -> dict[str, Any]:
    known = {"method": label(cell.method), "budget": str(cell.budget), "precision": cell.precision}
    return dict.fromkeys(COLUMNS, "") | known | {"seed": cell.seed, "folder": folder.name}


def _row(sweep: Sweep, cell: Cell, dense: Reference, folder: Path) -> dict[str, Any]:
    """One search, done."""
    assert cell.budget is not None
    assert cell.precision is not None
    one = run(sweep, cell.method, cell.budget, cell.seed, cell.precision, folder, label(cell.method), dense)
    found = one.metrics | one.cost() | {"nbytes": one.plan.nbytes, "dense_nbytes": one.plan.dense_nbytes}
    found |= {"status": "ok", "dense_auc": dense.metrics["auc"]}
    return _place(cell, folder) | {name: found[name] for name in COLUMNS if name in found}


def markdown(sweep: Sweep, rows: list[dict[str, Any]]) -> str:
    """The results as a table for people."""
    head = ("method", "budget", "seed", "bytes", "smaller", "test AUC", "to dense", "cost in dense trainings: samples")
    lines = [
        "# Searched tables",
        "",
        f"Data: {md(Path(sweep.data).name)}. Every row is within its budget, in the bytes of its serving form. The "
        "cost is that of all stages, retraining included.",
        "",
        "| " + " | ".join([*head, "seconds", "training bytes"]) + " |",
        "|" + "---|" * (len(head) + 2),
    ]
    for row in rows:
        first = (row["method"], f"{row['budget']} {row['precision']}", row["seed"])
        cells = (row["status"], *[""] * 6) if row["status"] != "ok" else _told(row)
        lines.append(markdown_row((*first, *cells)))
    return "\n".join(lines) + "\n"


def _told(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        format_bytes(row["nbytes"]),
        f"{row['dense_nbytes'] / row['nbytes']:.1f}x",
        f"{row['auc']:.4f}",
        f"{row['auc'] - row['dense_auc']:+.4f}",
        f"{row['samples_in_dense_trainings']:.2f}",
        f"{row['seconds_in_dense_trainings']:.2f}",
        format_bytes(row["training_nbytes"]),
    )
