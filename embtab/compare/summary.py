"""From the rows of results.csv to points: one method in one precision at one budget, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from embtab.compare.statistics import Difference, Interval, difference, mean_interval, resample_interval

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Point:
    """What was measured of one kind of table of one size.

    Args:
        rows: its finished runs, one a seed.
    """

    rows: tuple[Row, ...]

    @property
    def method(self) -> str:
        """With its options: "qr op=sum"."""
        return str(self.rows[0]["method"])

    @property
    def precision(self) -> str:
        """Of the served rows; "mixed" where tables differ."""
        return str(self.rows[0]["precision"])

    @property
    def budget(self) -> str:
        """As asked for; "none" without a limit."""
        return str(self.rows[0]["budget"])

    @property
    def free(self) -> bool:
        """Whether the method chose the precision itself, perhaps another for every feature: beside any other's."""
        return self.method == "auto" or self.precision == "mixed"

    @property
    def name(self) -> str:
        """For people: "unified, int8"."""
        return f"{self.method}, {'mixed precision' if self.precision == 'mixed' else self.precision}"

    @property
    def largest(self) -> Row:
        """The run of the most bytes: a search finds a shape of its own with every seed."""
        return max(self.rows, key=lambda row: row["nbytes"])

    @property
    def nbytes(self) -> int:
        """Serving bytes, the most of any run."""
        return int(self.largest["nbytes"])

    @property
    def smaller(self) -> float:
        """How many times smaller than dense tables in fp32."""
        return float(self.rows[0]["dense_nbytes"] / self.nbytes)

    @property
    def keys(self) -> frozenset[str]:
        """Of its runs; points of equal keys are the same runs."""
        return frozenset(row["key"] for row in self.rows)

    def by_seed(self, column: str) -> dict[int, Any]:
        """A column's values by seed; seeds without a value are left out."""
        return {row["seed"]: row[column] for row in self.rows if row[column] is not None}

    def mean(self, column: str) -> float | None:
        """Over seeds; None where it was not measured."""
        values = list(self.by_seed(column).values())
        return statistics.fmean(values) if values else None

    @property
    def validated(self) -> float:
        """Mean AUC on the validation split, by which tables are chosen; -inf where it is not known or not defined."""
        mean = self.mean("val_auc")
        return -math.inf if mean is None or math.isnan(mean) else mean

    @cached_property
    def auc(self) -> Interval:
        """Over seeds; of a single run the bootstrap's interval."""
        values = list(self.by_seed("auc").values())
        return mean_interval(values) if len(values) > 1 else self.test_interval or mean_interval(values)

    @cached_property
    def test_interval(self) -> Interval | None:
        """Of the mean AUC over resamples of the test set; None where they were not kept."""
        resampled = self.by_seed("auc_resampled")
        if len(resampled) < len(self.rows):
            return None
        means = [statistics.fmean(each) for each in zip(*resampled.values(), strict=True)]
        return resample_interval(statistics.fmean(self.by_seed("auc").values()), means)

    def minus(self, other: Point) -> Difference | None:
        """AUC minus that of another point, paired by seed and by resample."""
        resampled = (self.by_seed("auc_resampled"), other.by_seed("auc_resampled"))
        return difference(self.by_seed("auc"), other.by_seed("auc"), *resampled)

    def sliced(self, name: str, metric: str) -> dict[int, float]:
        """A metric on one slice of the test rows, by seed, where it is defined."""
        found = {seed: slices.get(name, {}).get(metric) for seed, slices in self.by_seed("slices").items()}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Summary:
    """All points of one ranker on one dataset.

    Args:
        points: in the order dense, then budgets as listed, then methods as listed. Where two have the same runs (at 1x
            every method is dense), only the first is kept.
        same: names of points left out for that, each with the name of the kept one.
        undone: the rows without a result: infeasible or failed.
        budgets: bytes of each budget, in the order listed.
        bayes: AUC of the best possible ranker, where it is known.
        spaces: names of the id spaces.
    """

    points: tuple[Point, ...]
    same: tuple[tuple[str, str], ...] = ()
    undone: tuple[Row, ...] = ()
    budgets: Mapping[str, int] | None = None
    bayes: float | None = None
    spaces: tuple[str, ...] = ()

    def dense(self, precision: str = "fp32") -> Point | None:
        """The dense tables in a precision."""
        return self._find("dense", precision, "none")

    def hash_beside(self, point: Point) -> Point | None:
        """The hashed tables of a point's budget and precision; of any precision, the best on the validation split,
        where the point was free to choose one.
        """
        if not point.free:
            return self._find("hash", point.precision, point.budget)
        hashed = [other for other in self.points if (other.method, other.budget) == ("hash", point.budget)]
        return max(hashed, key=lambda other: other.validated, default=None)

    def pareto(self) -> list[Point]:
        """The points that no smaller or equally large one surpasses in mean AUC, by bytes."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.nbytes, -point.auc.mean)):
            if not front or point.auc.mean > front[-1].auc.mean:
                front.append(point)
        return front

    def best(self, nbytes: int) -> list[Point]:
        """The points that fit into a budget, best first by mean AUC on the *validation* split.

        A choice by test AUC would report the luckiest of many; this way the test split stays unseen. Those whose AUC is
        not defined there come last.
        """
        fitting = [point for point in self.points if point.nbytes <= nbytes]
        return sorted(fitting, key=lambda point: point.validated, reverse=True)

    def _find(self, method: str, precision: str, budget: str) -> Point | None:
        wanted = (method, precision, budget)
        return next((p for p in self.points if (p.method, p.precision, p.budget) == wanted), None)


def summarise(
    rows: Sequence[Row], budgets: Sequence[str], bayes: float | None = None, spaces: Sequence[str] = ()
) -> Summary:
    """Groups the rows of one ranker on one dataset into points.

    Args:
        rows: of results.csv.
        budgets: as the sweep lists them.
        bayes: AUC of the best possible ranker, where it is known.
        spaces: names of the id spaces.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["precision"], row["budget"]), []).append(row)
    order = ["none", *budgets]
    points: dict[frozenset[str], Point] = {}
    same: list[tuple[str, str]] = []
    undone: list[Row] = []
    for _, members in sorted(groups.items(), key=lambda group: order.index(group[0][2])):
        point = Point(tuple(sorted((row for row in members if row["status"] == "ok"), key=lambda row: row["seed"])))
        undone += [row for row in members if row["status"] != "ok"]
        if point.rows and points.setdefault(point.keys, point) is not point:
            same.append((f"{point.name}, {point.budget}", f"{points[point.keys].name}, {points[point.keys].budget}"))
    sizes = {row["budget"]: row["budget_bytes"] for row in rows if row["budget_bytes"] is not None}
    listed = {budget: sizes[budget] for budget in budgets if budget in sizes}
    return Summary(tuple(points.values()), tuple(same), tuple(undone), listed, bayes, tuple(spaces))
