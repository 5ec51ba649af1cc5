"""What a figure of a report is, and how its numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

from embtab.compare.charts import Record, Spec
from embtab.compare.statistics import Difference, Interval
from embtab.compare.summary import Point, Summary
from embtab.compare.words import widest


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `texts` columns hold words, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 3


@dataclass(frozen=True)
class Panel:
    """One chart of a figure."""

    name: str
    title: str
    spec: Spec


@dataclass(frozen=True)
class Figure:
    """Charts about one question, and their numbers."""

    name: str
    title: str
    text: str
    panels: tuple[Panel, ...]
    table: Table


def methods_of(summary: Summary) -> list[str]:
    """In the order of the points."""
    return list(dict.fromkeys(point.method for point in summary.points))


def precisions_of(summary: Summary) -> list[str]:
    """Those in which anything but dense tables was measured; all where nothing else was."""
    every = dict.fromkeys(point.precision for point in summary.points)
    compressed = {point.precision for point in summary.points if point.method != "dense"}
    return [precision for precision in every if precision in compressed] or list(every)


def budget_of(point: Point) -> str:
    """As asked for."""
    return "no limit" if point.budget == "none" else point.budget


def name_of(point: Point) -> tuple[str, str, str]:
    """The first three cells of its row in a table."""
    return point.method, point.precision, budget_of(point)


def named(point: Point) -> Record:
    """The same, for a chart."""
    return dict(zip(("method", "precision", "budget"), name_of(point), strict=True))


def number(value: float | None, form: str = ".4f") -> str:
    """Empty where it is not known."""
    return "" if value is None else format(value, form)


def bounds(interval: Interval | None) -> str:
    """Such as "0.7144 to 0.7190"."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:.4f} to {interval.high:.4f}"


def signed(gap: Difference | None) -> str:
    """A difference with its half width; "n. s." where it may be chance."""
    if gap is None:
        return ""
    if gap.significant is None:
        return f"{gap.mean:+.4f}"
    interval = widest(gap)
    half = ((interval.high or 0.0) - (interval.low or 0.0)) / 2
    return f"{gap.mean:+.4f} ± {half:.4f}" + ("" if gap.significant else " n. s.")
