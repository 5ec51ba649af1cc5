"""The figures of a report: each a few charts, and a table of every number in them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from embtab.compare import charts
from embtab.compare.charts import Record
from embtab.compare.details import calibration, collisions, slices
from embtab.compare.figure import (
    Figure,
    Panel,
    Table,
    bounds,
    budget_of,
    drawn,
    methods_of,
    name_of,
    named,
    number,
    precisions_of,
    short_name,
    signed,
    titled,
)
from embtab.compare.searches import search_cost
from embtab.compare.summary import Point, Summary
from embtab.sizes import format_bytes

MAX_PARTS = len(charts.COLOURS)


def figures(summary: Summary) -> list[Figure]:
    """Those that the results hold data for."""
    made = (_auc, _parts, _speed, search_cost, slices, collisions, calibration)
    return [figure for figure in (make(summary) for make in made) if figure is not None]


def _auc(summary: Summary) -> Figure:
    records = {point: _auc_record(point) for point in summary.points}
    front = [{"line": "Pareto front", "nbytes": p.nbytes, "auc": p.auc.mean} for p in summary.pareto()]
    references = [
        {"line": name, "value": point.auc.mean}
        for name, point in (("dense, fp32", summary.dense()), ("dense, int8", summary.dense("int8")))
        if point is not None
    ]
    references += [] if summary.bayes is None else [{"line": "Bayes", "value": summary.bayes}]
    marks = [value for r in records.values() for value in (r["auc"], r["low"], r["high"]) if value is not None]
    marks += [line["value"] for line in references]
    margin = 0.03 * (max(marks) - min(marks))
    taken = [ranked[0] for nbytes in (summary.budgets or {}).values() if (ranked := summary.best(nbytes))]
    recommended = [point for point in taken if point.validated > -math.inf]
    panels = []
    for precision in precisions_of(summary):
        chosen = [records[point] for point in drawn(summary.points, precision)]
        spec = charts.against_bytes(
            chosen,
            methods_of(summary),
            "auc",
            "AUC on the test split",
            domain=(round(min(marks) - margin, 4), round(max(marks) + margin, 4)),
            references=references,
            front=front,
            recommended=[records[point] for point in recommended],
        )
        panels.append(Panel(f"auc-{precision}", titled(summary, precision), spec))
    text = (
        "Higher is better. Bars are 95 % intervals: over seeds, or over resamples of the test set where there is one "
        "seed. The Pareto front joins the points of all precisions that nothing smaller surpasses. Points of one "
        "budget are drawn side by side. Rings mark the table to take at each budget."
    )
    return Figure("auc", "AUC against bytes", text, tuple(panels), _auc_table(summary))


def _auc_record(point: Point) -> Record:
    return {
        "method": point.method,
        "precision": point.precision,
        "budget": budget_of(point),
        "nbytes": point.nbytes,
        "auc": point.auc.mean,
        "low": point.auc.low,
        "high": point.auc.high,
        "ne": point.mean("ne"),
        "runs": len(point.rows),
    }


def _auc_table(summary: Summary) -> Table:
    columns = (
        *("method", "rows", "budget", "bytes", "of dense", "AUC", "95 %, seeds", "95 %, test set"),
        *("against dense", "against hash", "log loss", "normalised entropy", "runs"),
    )
    dense = summary.dense()
    lines = []
    for point in summary.points:
        hashed = summary.hash_beside(point)
        over_seeds = point.auc if len(point.rows) > 1 else None
        lines.append(
            (
                *name_of(point),
                format_bytes(point.nbytes),
                f"{1 / point.smaller:.3g}x",
                f"{point.auc.mean:.4f}",
                bounds(over_seeds),
                bounds(point.test_interval),
                signed(None if dense is None or dense is point else point.minus(dense)),
                signed(None if hashed is None or hashed is point else point.minus(hashed)),
                number(point.mean("logloss")),
                number(point.mean("ne")),
                str(len(point.rows)),
            )
        )
    return Table(columns, tuple(lines))


def _parts(summary: Summary) -> Figure:
    totals: dict[str, int] = {}
    by_point: dict[Point, dict[str, int]] = {}
    for point in summary.points:
        kinds = by_point.setdefault(point, {})
        for part, nbytes in point.largest["bytes_by_part"].items():
            kind = kind_of(part, summary.spaces)
            kinds[kind] = kinds.get(kind, 0) + nbytes
        for kind, nbytes in kinds.items():
            totals[kind] = totals.get(kind, 0) + nbytes
    kept = sorted(totals, key=lambda kind: (-totals[kind], kind))
    if len(kept) > MAX_PARTS:
        kept = [*kept[: MAX_PARTS - 1], "other"]
    panels = []
    for precision in precisions_of(summary):
        records = [
            {"name": short_name(point), "part": part, "nbytes": nbytes}
            for point in drawn(by_point, precision)
            for part, nbytes in _merged(by_point[point], kept).items()
        ]
        panels.append(Panel(f"parts-{precision}", titled(summary, precision), charts.bars(records, kept)))
    lines = (
        (*name_of(point), format_bytes(point.nbytes), *(f"{_merged(kinds, kept).get(part, 0):,}" for part in kept))
        for point, kinds in by_point.items()
    )
    table = Table(("method", "rows", "budget", "bytes", *kept), tuple(lines))
    text = "What the serving bytes are spent on: everything that is needed to make a vector, and nothing else."
    return Figure("parts", "Bytes by part", text, tuple(panels), table)


def kind_of(part: str, spaces: Collection[str]) -> str:
    """What a part is, whosever it is: "C10@core2" and "C3@core1" are "core", "C1" is "rows".

    Args:
        part: as `Plan.bytes_by_part` names it: an id space; one and "@" or "." and more; or "@" first, of several.
        spaces: all id spaces, whose names may hold anything.
    """
    owners = [space for space in spaces if part == space or part.startswith((f"{space}@", f"{space}."))]
    if owners:
        return part[len(max(owners, key=len)) + 1 :].rstrip("0123456789") or "rows"
    _, _, own = part[1:].partition("@")
    return own.partition(".")[0] or "shared rows"


def _merged(kinds: dict[str, int], kept: Sequence[str]) -> dict[str, int]:
    merged = {kind: kinds[kind] for kind in kept if kind in kinds}
    rest = sum(nbytes for kind, nbytes in kinds.items() if kind not in kept)
    return merged | {"other": rest} if rest else merged


def _speed(summary: Summary) -> Figure | None:
    panels = []
    for precision in precisions_of(summary):
        for column, title in (("samples_per_s", "Training, samples/s"), ("latency_us", "Serving, microseconds/sample")):
            records = [
                {**named(point), "nbytes": point.nbytes, column: point.mean(column)}
                for point in drawn(summary.points, precision)
                if point.mean(column) is not None
            ]
            if records:
                spec = charts.against_bytes(records, methods_of(summary), column, title, log=True)
                name = f"speed-{column.split('_')[0]}-{precision}"
                panels.append(Panel(name, f"{title}, rows in {precision}", spec))
    if not panels:
        return None
    lines = (
        (
            *name_of(p),
            format_bytes(p.nbytes),
            number(p.mean("samples_per_s"), ",.0f"),
            number(p.mean("latency_us"), ".3f"),
        )
        for p in summary.points
    )
    table = Table(("method", "rows", "budget", "bytes", "samples/s", "latency, µs/sample"), tuple(lines))
    text = (
        "Training of tables and ranker together. Latency is that of looking one batch of the test split up in the "
        "plain torch tables, one thread, the median of repeats. Runs side by side slow each other: compare times of "
        "one machine and one --jobs only."
    )
    return Figure("speed", "Speed against bytes", text, tuple(panels), table)
