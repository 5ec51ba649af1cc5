"""Dense: one row per id, exact. The reference every other method is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, infeasible


@dataclass(frozen=True)
class Dense(Encoding):
    """The id is the row."""

    method: ClassVar[str] = "dense"
    bare: ClassVar[bool] = True

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


def dense_solution(space: Feature, spec: Spec) -> Solution:
    """The exact table of one id space; other methods use it for spaces that would not shrink."""
    return Solution([Dense(spec.dim, space.num_ids, (space.name,))], [spec.table(space.name, space.num_ids, spec.dim)])
