"""Runs a sweep: cell by cell, each done once, resumable to the cell."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from embtab.compare.report import Report, make_report, write_report
from embtab.compare.results import COLUMNS, place, read_results, write_parquet, write_results
from embtab.compare.summary import Row
from embtab.compare.sweep import Cell, Sweep, cell_key, training_key
from embtab.compare.workers import AnyJob, Job, SearchJob, outcomes
from embtab.datasets.schema import Dataset
from embtab.errors import InfeasibleBudget, UserError
from embtab.features import Feature, id_spaces, read_features
from embtab.fused import Optimizer
from embtab.methods import Spec
from embtab.planning import Plan, plan
from embtab.planning.specs import label
from embtab.sizes import parse_bytes
from embtab.training.setup import check_training


@dataclass(frozen=True)
class _Planned:
    """A cell's row before it runs; its plan, where that is known by then."""

    sweep: Sweep
    cell: Cell
    row: Row
    plan: Plan | None = None

    @property
    def group(self) -> str:
        """Equal for cells that share a training."""
        return training_key(self.sweep, self.plan, self.row["seed"]) if self.plan else str(self.row["key"])


def compare(sweep: Sweep, out: Path, jobs: int = 1) -> Report:
    """Runs what is not yet done of a sweep and writes the report.

    Args:
        sweep: what to compare.
        out: the folder of results.csv and the report; rows of earlier runs in it are kept and not run again.
        jobs: runs at a time, each in a process of its own.

    Returns:
        The report, which is also written.

    Raises:
        UserError: for settings that make no sense, or when another process writes to `out`.
    """
    from embtab.files import locked
    from embtab.training.setup import make_model

    dataset = Dataset.load(sweep.data)
    features = read_features(sweep.data)
    planned = []  # before anything is written: a mistake leaves no folder behind
    for one in sweep.each_model():
        planned += [_planned(one, dataset, features, cell) for cell in one.cells()]
        make_model(one, len(dataset.dense), len(dataset.features))
    check_training(sweep.seeds, lr=sweep.lr, weight_decay=sweep.weight_decay, init_std=sweep.init_std)
    Optimizer(sweep.table_optimizer, sweep.table_lr)
    with locked(out):
        rows = read_results(out / "results.csv")
        work = []
        for each in planned:
            done = _done(rows, each.row["key"])
            if each.row["status"] == "infeasible":
                rows[place(each.row)] = each.row
            elif done is not None:  # the same run, perhaps under another budget
                rows[place(each.row)] = {**done, **{k: each.row[k] for k in ("method", "budget", "budget_bytes")}}
            else:
                work.append(each)
        _train_all(work, rows, out, jobs)
        own = dict.fromkeys(place(each.row) for each in planned)  # once, though asked for in several precisions
        in_order = {key: rows[key] for key in own} | rows  # however often the sweep was interrupted
        write_results(out / "results.csv", list(in_order.values()))
        rows = read_results(out / "results.csv")  # what is reported is what is in the file
        write_parquet(out / "results.parquet", list(rows.values()))
        mine = [rows[key] for key in own]
        report = make_report(sweep, dataset, mine)
        write_report(report, out)
    failed = [row for row in mine if row["status"] == "failed"]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(mine)} runs failed (run again to retry them; the others are kept in "
            f"{out}); first {first['method']}, {first['budget']}, seed {first['seed']}: {first['error']}"
        )
    return report


def _planned(sweep: Sweep, dataset: Dataset, features: list[Feature], cell: Cell) -> _Planned:
    """What is known of a cell before it runs.

    Raises:
        UserError: for a method, option or budget that makes no sense.
    """
    from embtab.compare.searched import is_learned, search_key

    dense = Spec(sweep.dim).dense_bytes_of(id_spaces(features))
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "method": label(cell.method),
        "budget": "none" if cell.budget is None else str(cell.budget),
        "precision": cell.precision or "any precision",
        "seed": cell.seed,
        "dim": sweep.dim,
        "training": sweep.training,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "versions": {name: version(name) for name in ("embtab", "torch", "torchrec", "fbgemm-gpu")},
        "dense_nbytes": dense,
        "budget_bytes": None if cell.budget is None else parse_bytes(cell.budget, dense),
    }
    try:
        if is_learned(cell.method):  # it finds its plan when it runs
            return _Planned(sweep, cell, row | {"key": search_key(sweep, cell)})
        made = plan(features, cell.method, cell.budget, sweep.dim, cell.seed, cell.precision)
    except InfeasibleBudget as error:
        row |= {"status": "infeasible", "min_bytes": error.min_bytes, "error": str(error)}
        return _Planned(sweep, cell, row | {"key": f"infeasible {cell.name} {dataset.fingerprint}"})
    row |= {"precision": made.precision, "nbytes": made.nbytes, "bytes_by_part": made.bytes_by_part()}
    return _Planned(sweep, cell, row | {"key": cell_key(sweep, made, dataset.fingerprint, cell.seed)}, made)


def _train_all(work: list[_Planned], rows: dict[str, Row], out: Path, jobs: int) -> None:
    """Trains every cell once, writing results.csv after each; cells that train alike share one run."""
    groups: dict[str, list[_Planned]] = {}
    for each in work:
        groups.setdefault(each.group, []).append(each)
    tasks = {key: _job(members, out) for key, members in groups.items()}
    durations = [row["seconds"] for row in rows.values() if row["seconds"] is not None]
    write_results(out / "results.csv", list(rows.values()))
    # Closed in any case, so that the message of an error starts on a line of its own.
    with tqdm(total=len(groups), desc="runs", unit="run", file=sys.stderr) as bar:
        for finished, (key, seconds, found) in enumerate(outcomes(tasks, jobs), start=1):
            for each in groups[key]:
                rows[place(each.row)] = each.row | found[each.row["key"]]
            write_results(out / "results.csv", list(rows.values()))
            durations.append(seconds)
            left = seconds_left(durations, len(groups) - finished, jobs)
            for each in {each.row["key"]: each for each in reversed(groups[key])}.values():
                bar.write(f"{_said(rows[place(each.row)])}  (about {left:.0f} s left)", file=sys.stderr)
            bar.update()


def seconds_left(durations: list[float], runs: int, jobs: int) -> float:
    """How long the remaining runs take: as long as those so far on average, `jobs` of them at a time."""
    return statistics.fmean(durations) * -(-runs // jobs)


def _job(members: list[_Planned], out: Path) -> AnyJob:
    """One search; or one training, and the plans that it serves: the same tables in several precisions."""
    first = members[0]
    if first.plan is None:
        return SearchJob(first.sweep, first.cell, first.row["key"], out / "searches" / first.row["key"])
    plans = {each.row["key"]: each.plan for each in members if each.plan is not None}
    return Job(first.sweep, plans, first.row["seed"])


def _said(row: Row) -> str:
    result = f"auc {row['auc']:.5f}" if row["status"] == "ok" else f"{row['status']}: {row['error']}"
    return f"{row['method']}, {row['precision']}, {row['budget']}, seed {row['seed']}: {result}"


def _done(rows: dict[str, Row], key: str) -> Row | None:
    return next((row for row in rows.values() if row["key"] == key and row["status"] in ("ok", "infeasible")), None)
