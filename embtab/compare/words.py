"""The findings as sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from embtab.compare.statistics import Difference, Interval
from embtab.compare.summary import Point, Summary
from embtab.sizes import format_bytes


@dataclass(frozen=True)
class Advice:
    """The table to take at one budget.

    Attributes:
        budget: in bytes, and as it was asked for.
        choice: the table.
        reasons: all that is known of it.
        short: the first of that, for a line in a terminal.
    """

    budget: str
    choice: str
    reasons: str
    short: str


def advise(summary: Summary) -> list[Advice]:
    """One for each budget, in the order listed."""
    return [_advice(summary, budget, nbytes) for budget, nbytes in (summary.budgets or {}).items()]


def _advice(summary: Summary, budget: str, nbytes: int) -> Advice:
    size = format_bytes(nbytes)
    asked = size if budget.replace(" ", "") == size.replace(" ", "") else f"{size} ({budget})"
    ranked = summary.best(nbytes)
    if not ranked:
        return Advice(
            asked, "nothing fits", "every method that was tried needs more; the table of refusals says what.", ""
        )
    best = ranked[0]
    if best.validated == -math.inf:
        why = "AUC is not defined on the validation split, which chooses: its rows have one label; split the data anew."
        return Advice(asked, "undecided", why, "")
    parts = [f"AUC {best.auc.mean:.4f}"]
    dense = summary.dense()
    if dense is not None and best.keys != dense.keys:
        parts.append(against(best.minus(dense), "dense"))
    parts.append(times_smaller(best))
    short = ", ".join(parts)
    hashed = summary.hash_beside(best)
    if hashed is not None and hashed.keys != best.keys:
        parts.append(against(best.minus(hashed), "hash at equal bytes"))
    following = next((point for point in ranked[1:] if point.method != best.method), None)
    if following is not None:
        parts.append(f"the next is {following.name} ({format_bytes(following.nbytes)}): {next_to(best, following)}")
    return Advice(asked, best.name, "; ".join(parts) + ".", short)


def times_smaller(point: Point) -> str:
    """Such as "12x smaller"; dense tables are "as large as dense"."""
    return "as large as dense" if round(point.smaller, 2) == 1 else f"{point.smaller:.3g}x smaller"


def against(gap: Difference | None, reference: str) -> str:
    """Such as "0.0021 below dense (0.0011 to 0.0031)", or that it is not significant."""
    if gap is None:
        return f"not run with the seeds of {reference}"
    side = "above" if gap.mean > 0 else "below"
    said = f"{abs(gap.mean):.4f} {side} {reference}"
    if gap.significant is None:
        return f"{said} ({'one run' if gap.seeds.count == 1 else f'{gap.seeds.count} runs'}, no interval)"
    return f"{said} ({_bounds(gap.whole)})" if gap.significant else f"{said}, not significant"


def next_to(best: Point, following: Point) -> str:
    """What choosing the next best instead would cost."""
    gap = following.minus(best)
    if gap is None or gap.significant is None:
        return f"AUC {following.auc.mean:.4f}, no interval"
    if not gap.significant:
        return "not significantly different"
    return f"{abs(gap.mean):.4f} {'above' if gap.mean > 0 else 'below'} it"


def _bounds(interval: Interval) -> str:
    """Sizes of a difference that does not change its sign."""
    low, high = sorted((abs(interval.low or 0.0), abs(interval.high or 0.0)))
    return f"{low:.4f} to {high:.4f}"
