"""Runs a sweep: cell by cell, each done once, resumable to the cell."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from embtab.compare.report import markdown
from embtab.compare.sweep import Cell, Sweep, cell_key, label
from embtab.datasets.schema import Dataset
from embtab.errors import InfeasibleBudget, UserError
from embtab.features import read_features
from embtab.files import locked, write_text
from embtab.lookup import Optimizer
from embtab.planning import Plan, plan

Row = dict[str, Any]
METRICS = ("auc", "logloss", "ne", "calibration", "gauc", "val_auc", "epochs", "samples_per_s", "seconds")
COLUMNS = (
    *("key", "status", "method", "budget", "precision", "seed", "budget_bytes", "nbytes", "dense_nbytes", "min_bytes"),
    *METRICS,
    *("bytes_by_part", "training", "dim", "dataset", "fingerprint", "versions", "error"),
)


@dataclass(frozen=True)
class _Work:
    """A cell that is to be trained, and the row it will fill."""

    plan: Plan
    row: Row


def compare(sweep: Sweep, out: Path, jobs: int = 1) -> str:
    """Runs what is not yet done of a sweep and writes the report.

    Args:
        sweep: what to compare.
        out: the folder of results.csv and report.md; rows of earlier runs in it are kept and not run again.
        jobs: cells trained at a time, each in a process of its own.

    Returns:
        The report as Markdown.

    Raises:
        UserError: for settings that make no sense, or when another process writes to `out`.
    """
    dataset = Dataset.load(sweep.data)
    from embtab.compare.train import make_model

    planned = _planned(sweep, dataset)  # before anything is written: a mistake leaves no folder behind
    make_model(sweep, len(dataset.dense), len(dataset.features))
    Optimizer(sweep.table_optimizer, sweep.table_lr)
    with locked(out):
        rows = _read(out / "results.csv")
        work: list[_Work] = []
        for row, made in planned:
            done = None if made is None else _done(rows, row["key"])
            if made is None:
                rows[_place(row)] = row
            elif done is not None:  # the same run, perhaps under another budget
                rows[_place(row)] = {**done, **{k: row[k] for k in ("method", "budget", "budget_bytes")}}
            else:
                work.append(_Work(made, row))
        _write(out / "results.csv", rows)
        _train_all(sweep, work, rows, out, jobs)
        mine = [rows[_place(row)] for row, _ in planned]
        report = markdown(sweep, dataset, mine)
        write_text(out / "report.md", report)
    failed = [row for row in mine if row["status"] == "failed"]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(mine)} runs failed (run again to retry them; the others are kept in "
            f"{out}); first {first['method']}, {first['budget']}, seed {first['seed']}: {first['error']}"
        )
    return report


def _planned(sweep: Sweep, dataset: Dataset) -> list[tuple[Row, Plan | None]]:
    """Every cell's row before it runs, with its plan; None where its budget is infeasible.

    Raises:
        UserError: for a method, option or budget that makes no sense.
    """
    features = read_features(sweep.data)
    planned: list[tuple[Row, Plan | None]] = []
    for cell in sweep.cells():
        row = _row(sweep, dataset, cell)
        try:
            made = plan(features, cell.method, cell.budget, sweep.dim, cell.seed, cell.precision)
        except InfeasibleBudget as error:
            row |= {"status": "infeasible", "min_bytes": error.min_bytes, "error": str(error)}
            planned.append((row | {"key": f"infeasible {cell.name} {dataset.fingerprint}"}, None))
            continue
        row |= {"nbytes": made.nbytes, "dense_nbytes": made.dense_nbytes, "budget_bytes": made.budget}
        row |= {"bytes_by_part": made.bytes_by_part(), "key": cell_key(sweep, made, dataset.fingerprint, cell.seed)}
        planned.append((row, made))
    return planned


def _train_all(sweep: Sweep, work: list[_Work], rows: dict[str, Row], out: Path, jobs: int) -> None:
    """Trains every cell once, writing results.csv after each; cells of equal key share one run."""
    by_key: dict[str, list[_Work]] = {}
    for each in work:
        by_key.setdefault(each.row["key"], []).append(each)
    bar = tqdm(total=len(by_key), desc="runs", unit="run", file=sys.stderr)
    started = time.perf_counter()
    for finished, (key, outcome) in enumerate(_outcomes(sweep, by_key, jobs), start=1):
        for each in by_key[key]:
            rows[_place(each.row)] = each.row | outcome
        _write(out / "results.csv", rows)
        row = by_key[key][0].row | outcome
        result = f"auc {row['auc']:.5f}" if row["status"] == "ok" else f"failed: {row['error']}"
        left = (time.perf_counter() - started) / finished * (len(by_key) - finished)
        bar.write(
            f"{row['method']}, {row['budget']}, seed {row['seed']}: {result}  (about {left:.0f} s left)",
            file=sys.stderr,
        )
        bar.update()
    bar.close()


def _outcomes(sweep: Sweep, by_key: dict[str, list[_Work]], jobs: int) -> Iterator[tuple[str, Row]]:
    """(key, status and metrics) of each run as it ends."""
    if jobs == 1:
        for key, works in by_key.items():
            yield key, _outcome(sweep, works[0])
        return
    # Spawned, since a fork of a process that has used OpenMP may hang.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_outcome, sweep, works[0]): key for key, works in by_key.items()}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(sweep: Sweep, work: _Work) -> Row:
    """Trains one cell; a failure is a result too, and the rest of the sweep goes on."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # also in processes that the command line did not start
    from embtab.compare.train import train

    try:
        return {"status": "ok", **train(sweep, work.plan, work.row["seed"])}
    except Exception as error:
        return {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())}


def _row(sweep: Sweep, dataset: Dataset, cell: Cell) -> Row:
    """What is known of a cell before it runs."""
    row: Row = dict.fromkeys(COLUMNS)
    packages = ("embtab", "torch", "torchrec", "fbgemm-gpu")
    return row | {
        "method": label(cell.method),
        "budget": "none" if cell.budget is None else str(cell.budget),
        "precision": cell.precision,
        "seed": cell.seed,
        "dim": sweep.dim,
        "training": sweep.training,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "versions": {name: version(name) for name in packages},
    }


def _place(row: Row) -> str:
    """What a row is about; a new result replaces an old one of the same place."""
    settings = json.dumps(row["training"], sort_keys=True)
    return "|".join(
        str(part)
        for part in (
            row["fingerprint"],
            row["method"],
            row["budget"],
            row["precision"],
            row["seed"],
            row["dim"],
            settings,
        )
    )


def _done(rows: dict[str, Row], key: str) -> Row | None:
    return next((row for row in rows.values() if row["key"] == key and row["status"] == "ok"), None)


def _read(file: Path) -> dict[str, Row]:
    """The rows of an earlier run, by place.

    Raises:
        UserError: when the file is not a results.csv of this version.
    """
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{file}: not a results.csv of this version of embtab; choose another --out")
        rows = [{name: _parsed(name, text) for name, text in row.items()} for row in reader]
    return {_place(row): row for row in rows}


def _write(file: Path, rows: dict[str, Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows.values():
        writer.writerow({name: _printed(row[name]) for name in COLUMNS})
    write_text(file, text.getvalue())


def _printed(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _parsed(name: str, text: str) -> Any:
    if text == "":
        return None
    return text if name in _TEXTS else json.loads(text)


_TEXTS = ("key", "status", "method", "budget", "precision", "dataset", "fingerprint", "error")
