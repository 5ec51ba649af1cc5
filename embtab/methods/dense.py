"""Dense: one row per id, exact. The reference every other method is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec
from embtab.methods.solver import infeasible


@dataclass(frozen=True)
class Dense(Encoding):
    """The id is the row."""

    method: ClassVar[str] = "dense"
    arithmetic: ClassVar[str | None] = "id"
    bare: ClassVar[bool] = True

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per id."""
        return [(self.bounded_ids, self.dim)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """None are needed."""
        return {}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The id itself."""
        return ids

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row itself."""
        return parts[0]

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: an entry of a vector is an entry of a row."""
        return [PartInit(0.0, std)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """One full table per id space; there is nothing to choose."""
        each = [dense_solution(space, spec) for space in spaces]
        solution = Solution([one.encodings[0] for one in each], [one.tables[0] for one in each])
        if budget is not None and solution.nbytes > budget:
            raise infeasible(cls.method, budget, solution.nbytes)
        return solution


def shared_budget(spaces: Sequence[Feature], budget: int | None, spec: Spec, method: str, least: int) -> int | Solution:
    """What a method has for one table of all id spaces; or their exact tables, which are better where they fit.

    Args:
        spaces: the id spaces.
        budget: serving bytes; None for as many as the exact tables take.
        spec: dimension and precision.
        method: for the error message.
        least: bytes of the smallest table of the method.

    Raises:
        InfeasibleBudget: when neither fits.
    """
    size = spec.dense_bytes_of(spaces)
    can_be_exact = not any(space.hashed for space in spaces)
    if can_be_exact and (budget is None or size <= budget):
        return Dense.solve(spaces, None, spec)
    budget = max(size, least) if budget is None else budget
    if budget < least:
        raise infeasible(method, budget, min(least, size) if can_be_exact else least)
    return budget


def dense_solution(space: Feature, spec: Spec) -> Solution:
    """The exact table of one id space; other methods use it for spaces that would not shrink."""
    return Solution([Dense(spec.dim, space.num_ids, (space.name,))], [spec.table(space.name, space.num_ids, spec.dim)])
