"""What a figure of a report is, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from embtab.compare.charts import Record, Spec
from embtab.compare.statistics import Difference, Interval
from embtab.compare.summary import Point, Summary


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
    """The precisions that have panels of their own: in which anything but dense tables was asked for; all of them where
    nothing else was.
    """
    asked = [point for point in summary.points if not point.free] or summary.points
    compressed = {point.precision for point in asked if point.method != "dense"}
    every = dict.fromkeys(point.precision for point in asked)
    return [precision for precision in every if precision in compressed] or list(every)


def drawn(points: Iterable[Point], precision: str) -> list[Point]:
    """Those of a precision's panel: with them stand the points that were free to choose another."""
    return [point for point in points if point.free or point.precision == precision]


def titled(summary: Summary, precision: str) -> str:
    """Of a precision's panel."""
    free = dict.fromkeys(p.method for p in summary.points if p.free and p.precision != precision)
    return f"Rows served in {precision}" + (f" ({', '.join(free)}: precision of its own)" if free else "")


def budget_of(point: Point) -> str:
    """As asked for."""
    return "no limit" if point.budget == "none" else point.budget


def short_name(point: Point) -> str:
    """Of a bar or line of a precision's panel."""
    return f"{point.method}{f' ({point.precision})' if point.free else ''}, {budget_of(point)}"


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
    half = ((gap.whole.high or 0.0) - (gap.whole.low or 0.0)) / 2
    return f"{gap.mean:+.4f} ± {half:.4f}" + ("" if gap.significant else " n. s.")
