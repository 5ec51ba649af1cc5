"""The report of a sweep, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from embtab.compare.sweep import Sweep
from embtab.datasets.schema import Dataset
from embtab.sizes import format_bytes

Row = dict[str, Any]


def markdown(sweep: Sweep, dataset: Dataset, rows: Sequence[Row]) -> str:
    """A table with a line per method and budget: bytes, mean and spread of the metrics over seeds.

    Args:
        sweep: what was compared.
        dataset: what it was compared on.
        rows: results of its cells.
    """
    dense = next((row["dense_nbytes"] for row in rows if row["dense_nbytes"]), None)
    lines = [f"# {dataset.name}: embedding tables at equal bytes", ""]
    splits = ", ".join(f"{dataset.rows(split):,} {split}" for split in ("train", "valid", "test"))
    lines += [f"{splits} rows (fingerprint `{dataset.fingerprint}`); {sweep.model.get('name')}, dim {sweep.dim}.", ""]
    lines += [
        f"Mean ± standard deviation over seeds {', '.join(map(str, sweep.seeds))}, on the test split. "
        f"{'Dense tables take ' + format_bytes(dense) + '.' if dense else ''}",
        "",
        "| method | rows | budget | bytes | of dense | AUC | log loss | normalised entropy | samples/s | runs |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["precision"], row["budget"]), []).append(row)
    order = ["none", *map(str, sweep.budgets)]
    for (method, precision, budget), members in sorted(groups.items(), key=lambda item: order.index(item[0][2])):
        lines.append(_line(method, precision, budget, members))
    if dataset.bayes:
        best = "the best any ranker can do on this test split, known since the data is generated"
        lines.append(
            f"| *Bayes* | | | | | {dataset.bayes['auc']:.4f} | {dataset.bayes['logloss']:.4f} | | | |\n\nBayes: {best}."
        )
    return "\n".join(lines) + "\n"


def _line(method: str, precision: str, budget: str, rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["status"] == "ok"]
    shown = "no limit" if budget == "none" else budget
    if not done:
        first = rows[0]
        why = f"failed: {first['error']}"
        if first["status"] == "infeasible":
            why = f"infeasible: needs {format_bytes(first['min_bytes'])}"
        return f"| {method} | {precision} | {shown} | {why} | | | | | | 0 |"
    nbytes, dense = done[0]["nbytes"], done[0]["dense_nbytes"]
    cells = [
        method,
        precision,
        shown,
        format_bytes(nbytes),
        f"{nbytes / dense:.3g}x",
        *(_spread([row[name] for row in done]) for name in ("auc", "logloss", "ne")),
        f"{statistics.mean(row['samples_per_s'] for row in done):,.0f}",
        str(len(done)),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
