"""A study's results as Markdown: means over seeds with their intervals, and differences to one arm, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from embtab.compare.statistics import LEVEL, Interval, difference, mean_interval
from embtab.datasets.schema import Dataset
from embtab.sequences.study import Study
from embtab.sizes import format_bytes
from embtab.text import markdown, markdown_row

SHOWN = {"auc": "AUC", "gauc": "GAUC", "hr@10": "HR@10", "ndcg@10": "NDCG@10", "search_ndcg": "search NDCG@20"}
Row = dict[str, Any]


def report(study: Study, dataset: Dataset, rows: Sequence[Row]) -> str:
    """The report of the rows of a study, which are all of its cells."""
    shown = [name for name in SHOWN if any(row[name] is not None for row in rows)]
    reference = study.reference or study.arms[0].name
    head = ["arm", "method", "budget", "bytes", "attention", "seeds", *map(SHOWN.get, shown), f"AUC - {reference}", "s"]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"], row["arm"]), []).append(row)
    rule = "|".join("---" if i < 3 else "---:" for i in range(len(head)))
    lines = [_line(head), f"|{rule}|"]
    for (method, budget, arm), own in groups.items():
        begin = [arm, method, "no limit" if budget == "none" else budget]
        ok = [row for row in own if row["status"] == "ok"]
        if not ok and own[0]["status"] == "failed":
            lines.append(_line([*begin, f"failed: {own[0]['error']}", *[""] * (len(head) - 4)]))
            continue
        if not ok:
            least = f"infeasible: a table needs {format_bytes(own[0]['min_bytes'])}"
            lines.append(_line([*begin, least, *[""] * (len(head) - 4)]))
            continue
        other = [row for row in groups.get((method, budget, reference), []) if row["status"] == "ok"]
        numbers = [format_bytes(ok[0]["nbytes"]), format_bytes(ok[0]["attention_bytes"] or 0), str(len(ok))]
        numbers += [_printed(_interval([row[name] for row in ok])) for name in shown]
        numbers += ["" if arm == reference else _gap(ok, other), f"{sum(row['seconds'] for row in ok) / len(ok):.0f}"]
        lines.append(_line([*begin, *numbers]))
    about = (
        f"{markdown(dataset.name)}: {dataset.rows('train'):,} training rows, {dataset.rows('test'):,} test rows. Means "
        f"over seeds with Student's {LEVEL:.0%} intervals over seeds; the difference is paired by seed, and by "
        "resample of the test set where these were kept: its interval holds both chances (two seeds give none). "
        "`bytes` are those of all tables, `attention` those of the attention's own; `s` are seconds of a run."
    )
    best = f" The best possible AUC is {dataset.bayes['auc']:.4f}." if dataset.bayes else ""
    return "\n".join(["# Sequence models", "", about + best, "", *lines, ""])


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return mean_interval(known) if len(known) == len(values) else None


def _gap(rows: Sequence[Row], others: Sequence[Row]) -> str:
    values, resampled = zip(*(_by_seed(each) for each in (rows, others)), strict=True)
    found = difference(*values, *resampled)
    return "" if found is None else _printed(found.whole, "+.4f")


def _by_seed(rows: Sequence[Row]) -> tuple[dict[int, float], dict[int, list[float]]]:
    """AUC, and AUC on resamples where these were kept."""
    kept = {row["seed"]: row["auc_resampled"] for row in rows if row["auc_resampled"] is not None}
    return {row["seed"]: row["auc"] for row in rows}, kept


def _printed(interval: Interval | None, form: str = ".4f") -> str:
    if interval is None:
        return ""
    mean = format(interval.mean, form)
    return mean if interval.high is None else f"{mean} ± {interval.high - interval.mean:.4f}"


def _line(cells: Iterable[Any]) -> str:
    return markdown_row(cells)
