"""Figures for the sceptic: rare and unseen ids, collisions, calibration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from embtab.compare import charts
from embtab.compare.charts import Record
from embtab.compare.figure import (
    Figure,
    Panel,
    Table,
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
from embtab.compare.statistics import Difference, difference
from embtab.compare.summary import Point, Summary
from embtab.sizes import format_bytes

SLICES = {
    "unseen": "Rows with an id never seen in training",
    "rare": "Rows of rare ids",
    "frequent": "Rows of frequent ids alone",
}


def slices(summary: Summary) -> Figure | None:
    """What compression costs on rows of rare and unseen ids; None where it was not measured."""
    dense = summary.dense()
    measured = [point for point in summary.points if any(point.sliced(name, "auc") for name in SLICES)]
    if dense is None or not measured:
        return None
    panels = []
    for precision in precisions_of(summary):
        for name, said in SLICES.items():
            records = []
            for point in drawn(measured, precision):
                gap = _slice_gap(point, dense, name)
                if gap is not None and point is not dense:
                    records.append({**named(point), "nbytes": point.nbytes, "loss": gap.mean, **_ends(gap)})
            if records:
                zero = [{"line": "dense, fp32", "value": 0.0}]
                axis = f"AUC minus that of dense, {name}"
                spec = charts.against_bytes(records, methods_of(summary), "loss", axis, references=zero)
                panels.append(Panel(f"slices-{name}-{precision}", f"{said}, served in {precision}", spec))
    if not panels:
        return None
    first = next(iter(measured[0].by_seed("slices").values()))
    text = (
        f"Test rows by the rarest of their ids, that is by its occurrences in training. Unseen: it never occurs there "
        f"(or is the id that all rare values share); {first['unseen']['rows']:,} rows. Of the others, rare: it occurs "
        f"at most {first['rare']['up_to']:g} times, the median; {first['rare']['rows']:,} rows. Frequent: the rest; "
        f"{first['frequent']['rows']:,} rows. Features without counts are not looked at. Bars are 95 % intervals over "
        "seeds; chance in the choice of the rows is not in them."
    )
    own = (f"{column}, {name}" for name in SLICES for column in ("AUC", "against dense", "log loss"))
    columns = ("method", "rows", "budget", "bytes", *own)
    lines = tuple((*name_of(p), format_bytes(p.nbytes), *_slice_cells(p, dense)) for p in measured)
    return Figure("slices", "Rare and unseen ids", text, tuple(panels), Table(columns, lines))


def _slice_cells(point: Point, dense: Point) -> list[str]:
    cells = []
    for name in SLICES:
        found = point.sliced(name, "auc"), point.sliced(name, "logloss")
        auc, loss = (statistics.fmean(values.values()) if values else None for values in found)
        gap = None if point is dense else _slice_gap(point, dense, name)
        cells += [number(auc), signed(gap), number(loss)]
    return cells


def _slice_gap(point: Point, dense: Point, name: str) -> Difference | None:
    return difference(point.sliced(name, "auc"), dense.sliced(name, "auc"))


def _ends(gap: Difference) -> Record:
    return {"low": gap.whole.low, "high": gap.whole.high}


def collisions(summary: Summary) -> Figure | None:
    """The share of each feature's ids that no ranker can tell apart; None where it was not measured."""
    counted = {point: _shared(point) for point in summary.points if point.by_seed("collisions")}
    if not counted:
        return None
    sizes = {space: ids for found in counted.values() for space, (_, ids) in found.items()}
    spaces = sorted(sizes, key=lambda space: (-sizes[space], space))
    panels = []
    for precision in precisions_of(summary):
        records = [
            {
                "name": short_name(point),
                "column": space,
                "share": found[space][0] / sizes[space],
                "ids": sizes[space],
            }
            for point in drawn(counted, precision)
            for found in [counted[point]]
            if any(shared for shared, _ in found.values())
            for space in spaces
            if space in found
        ]
        if records:
            spec = charts.heat(records, "share", "ids that share their vector")
            panels.append(Panel(f"collisions-{precision}", titled(summary, precision), spec))
    lines = tuple(
        (*name_of(point), format_bytes(point.nbytes), *(f"{found[s][0]:,.0f}" if s in found else "" for s in spaces))
        for point, found in counted.items()
    )
    columns = ("method", "rows", "budget", "bytes", *(f"{space} ({sizes[space]:,})" for space in spaces))
    text = (
        "Ids whose served vector is exactly that of another id of the feature, so that no ranker can tell them apart; "
        "counted over all ids of the trained tables, mean over seeds. Features with the most ids first; tables not "
        "shown have no such ids. Spaces of more than 2 million ids are not counted."
    )
    return Figure("collisions", "Collisions by feature", text, tuple(panels), Table(columns, lines))


def _shared(point: Point) -> dict[str, tuple[float, int]]:
    """Mean number of sharing ids over seeds, and the number of ids, by id space."""
    runs = list(point.by_seed("collisions").values())
    return {space: (statistics.fmean(run[space][0] for run in runs), ids) for space, (_, ids) in runs[0].items()}


def calibration(summary: Summary) -> Figure | None:
    """Whether predicted rates come true, by decile of the predictions; None where it was not measured."""
    measured = {point: _mean_deciles(point) for point in summary.points if point.by_seed("deciles")}
    if not measured:
        return None
    panels = []
    for precision in precisions_of(summary):
        shown = drawn(measured, precision)
        for budget in dict.fromkeys(point.budget for point in shown if point.method != "dense"):
            records = [
                {**named(point), "decile": i, "predicted": predicted, "observed": observed}
                for point in shown
                if point.budget == budget or point.method == "dense"
                for i, (predicted, observed) in enumerate(measured[point], start=1)
            ]
            spec = charts.reliability(records, methods_of(summary))
            panels.append(Panel(f"calibration-{precision}-{budget}", f"At {budget}, rows in {precision}", spec))
    if not panels:
        return None
    columns = ("method", "rows", "budget", "bytes", "predicted/observed", *(f"decile {i}" for i in range(1, 11)))
    lines = tuple(
        (*name_of(point), format_bytes(point.nbytes), number(point.mean("calibration")))
        + tuple(f"{predicted:.4f} / {observed:.4f}" for predicted, observed in groups)
        + ("",) * (10 - len(groups))
        for point, groups in measured.items()
    )
    text = (
        "The test rows in ten groups of equal size by predicted rate: on the dotted line a group's clicks come as "
        "often as predicted. The table's cells are predicted / observed; its first number is the mean prediction over "
        "the base rate."
    )
    return Figure("calibration", "Calibration", text, tuple(panels), Table(columns, lines))


def _mean_deciles(point: Point) -> list[tuple[float, float]]:
    """Predicted and observed rate of each group, means over seeds."""
    runs: Sequence[list[list[float]]] = list(point.by_seed("deciles").values())
    return [
        (statistics.fmean(group[0] for group in groups), statistics.fmean(group[1] for group in groups))
        for groups in zip(*runs, strict=True)
    ]
