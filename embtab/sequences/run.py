"""Runs a study: cell by cell, each done once, resumable to the cell; results.csv after each, then the report."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from embtab.compare.rows import read_rows, write_rows
from embtab.compare.summary import Row
from embtab.datasets.schema import Dataset
from embtab.errors import InfeasibleBudget, UserError
from embtab.files import locked, write_text
from embtab.fused import Optimizer
from embtab.planning.specs import label
from embtab.sequences.plot import plot
from embtab.sequences.report import report
from embtab.sequences.study import Cell, Study
from embtab.training.setup import check_training

TEXTS = ("key", "status", "arm", "method", "budget", "error")
SIZES = ("seed", "nbytes", "attention_bytes", "min_bytes", "epochs")
MEASURED = ("auc", "gauc", "hr@10", "ndcg@10", "search_ndcg", "logloss", "ne", "calibration", "val_auc", "seconds")
COLUMNS = ("key", "status", "arm", "method", "budget", *SIZES, *MEASURED, "error", "auc_resampled")


def run_study(study: Study, out: Path) -> str:
    """Runs what is not yet done of a study and writes results.csv, report.md and auc.png; a run that fails is noted,
    and the others go on.

    Args:
        study: what to compare.
        out: the folder; rows of earlier runs in it are kept and not run again.

    Returns:
        The report as Markdown.

    Raises:
        UserError: for settings that make no sense, when another process writes to `out`, or at the end where runs
            failed.
    """
    dataset = Dataset.load(study.data)
    cells = {study.key(cell, dataset.fingerprint): cell for cell in study.cells()}
    if not cells:
        raise UserError("nothing to run: methods that compress need budgets, and every study needs seeds and arms")
    check_training(study.seeds, lr=study.lr, weight_decay=study.weight_decay, init_std=study.init_std, l2=study.l2)
    Optimizer(study.table_optimizer, study.table_lr)
    infeasible = _checked(study, cells)  # before anything is written: a mistake leaves no folder behind
    with locked(out):
        rows = read_results(out / "results.csv")
        rows |= infeasible
        left = [key for key in cells if key not in rows or rows[key]["status"] == "failed"]
        _quieten()
        for key in tqdm(left, desc="runs", unit="run", file=sys.stderr):
            row = rows[key] = _trained_or_why(study, cells[key], key)
            write_rows(out / "results.csv", COLUMNS, list(rows.values()))
            said = f"failed: {row['error']}" if row["error"] else f"auc {row['auc']:.5f}, {row['seconds']:.0f} s"
            tqdm.write(f"{cells[key].name}: {said}", file=sys.stderr)
        in_order = {key: rows[key] | _named(cell) for key, cell in cells.items()}
        write_rows(out / "results.csv", COLUMNS, list((rows | in_order).values()))
        rows = read_results(out / "results.csv")  # what is reported is what is in the file
        text = report(study, dataset, [rows[key] for key in cells])
        write_text(out / "report.md", text)
        if not any(rows[key]["status"] == "ok" for key in cells):
            print("no auc.png: no run has a result", file=sys.stderr)
        elif find_spec("matplotlib") is None:
            print("no auc.png: install matplotlib with: pip install 'embtab[plot]'", file=sys.stderr)
        else:
            plot([rows[key] for key in cells], out / "auc.png")
    failed = [key for key in cells if rows[key]["status"] == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed (run again to retry them; the others are kept in {out}); first "
            f"{cells[failed[0]].name}: {rows[failed[0]]['error']}"
        )
    return text


def _checked(study: Study, cells: Mapping[str, Cell]) -> dict[str, Row]:
    """Makes the plan of every cell; the rows of those whose budget is infeasible.

    Raises:
        UserError: for a method, option, budget or feature that makes no sense.
    """
    from embtab.sequences.train import make_plans

    rows = {}
    for key, cell in cells.items():
        try:
            make_plans(study, cell)
        except InfeasibleBudget as error:
            empty = dict.fromkeys(COLUMNS) | {"key": key, **_named(cell)}
            rows[key] = empty | {"status": "infeasible", "min_bytes": error.min_bytes, "error": str(error)}
    return rows


def _trained_or_why(study: Study, cell: Cell, key: str) -> Row:
    """The row of a run, which notes a failure of any kind: no run stops the others."""
    try:
        return _trained(study, cell, key)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return dict.fromkeys(COLUMNS) | {"key": key, "status": "failed", **_named(cell), "error": why}


def _trained(study: Study, cell: Cell, key: str) -> Row:
    from embtab.sequences.train import train

    found = train(study, cell)
    row = dict.fromkeys(COLUMNS) | {"key": key, "status": "ok", **_named(cell)}
    return row | {name: value for name, value in found.items() if name in COLUMNS}


def _named(cell: Cell) -> Row:
    budget = "none" if cell.budget is None else str(cell.budget)
    return {"arm": cell.arm.name, "method": label(cell.method), "budget": budget, "seed": cell.seed}


def read_results(file: Path) -> dict[str, Row]:
    """The rows of an earlier run, by key.

    Raises:
        UserError: when the file is not a results.csv of a study.
    """
    return read_rows(file, COLUMNS, TEXTS, itemgetter("key"), COLUMNS[:-1])  # some have no resamples


def _quieten() -> None:
    """Lightning's tips, which do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
