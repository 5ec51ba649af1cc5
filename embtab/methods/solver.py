"""A budget shared between id spaces, for methods whose spaces have tables of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from embtab.errors import InfeasibleBudget
from embtab.features import Feature
from embtab.methods.base import Solution, Spec
from embtab.sizes import format_bytes

Choose = Callable[[Feature, int], Solution]


def fill(spaces: Sequence[Feature], budget: int | None, spec: Spec, method: str, choose: Choose) -> Solution:
    """Shares a budget between id spaces in proportion to their dense bytes, then spends what rounding left over.

    Args:
        spaces: the id spaces.
        budget: bytes; None gives every space its dense bytes.
        spec: dimension and precision, which say what a dense table takes.
        method: for the error message.
        choose: (space, target bytes) -> the largest solution for this one space of at most `target` bytes, or its
            smallest solution if nothing is that small. More target bytes never give a solution smaller by a row.

    Raises:
        InfeasibleBudget: when the smallest solutions together exceed the budget.
    """
    dense = [spec.dense_bytes(space) for space in spaces]

    def shared(share: float) -> list[Solution]:
        return [choose(space, int(share * size)) for space, size in zip(spaces, dense, strict=True)]

    if budget is None:
        return _merged(shared(1.0))
    chosen = shared(0.0)
    smallest = sum(one.nbytes for one in chosen)
    if smallest > budget:
        raise infeasible(method, budget, smallest)
    low, high = 0.0, 1.0
    if sum(one.nbytes for one in shared(high)) <= budget:
        return _merged(shared(high))
    for _ in range(60):
        middle = (low + high) / 2
        tried = shared(middle)
        if sum(one.nbytes for one in tried) <= budget:
            low, chosen = middle, tried
        else:
            high = middle
    # Small spaces first: making them exact costs least. Where a large step is left over, large spaces first.
    by_size = sorted(range(len(spaces)), key=lambda i: (dense[i], spaces[i].name))
    first = _topped_up(chosen, by_size, spaces, budget, choose)
    if sum(one.nbytes for one in first) >= 0.9 * budget:
        return _merged(first)
    second = _topped_up(chosen, by_size[::-1], spaces, budget, choose)
    return _merged(max(first, second, key=lambda each: sum(one.nbytes for one in each)))


def _topped_up(
    chosen: Sequence[Solution], order: Sequence[int], spaces: Sequence[Feature], budget: int, choose: Choose
) -> list[Solution]:
    """Offers what is left of the budget to one space after the other."""
    grown = list(chosen)
    left = budget - sum(one.nbytes for one in chosen)
    for i in order:
        larger = choose(spaces[i], grown[i].nbytes + left)
        left -= larger.nbytes - grown[i].nbytes
        grown[i] = larger
    return grown


def _merged(parts: Sequence[Solution]) -> Solution:
    return Solution([e for part in parts for e in part.encodings], [t for part in parts for t in part.tables])


def infeasible(method: str, budget: int, smallest: int) -> InfeasibleBudget:
    """The error for a budget below the smallest size a method can reach."""
    return InfeasibleBudget(
        f"method {method!r} cannot fit into {format_bytes(budget)} ({budget} bytes): its smallest form needs "
        f"{format_bytes(smallest)} ({smallest} bytes); raise the budget or choose a method that compresses further",
        smallest,
    )
