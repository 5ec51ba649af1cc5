"""Low rank: a narrow table and one projection without bias, in place of a wide table.

    vector(id) = T[id] P        T [n, d], P [d, D], 1 <= d < D

The strongest of the simple baselines as long as a number per id fits (`ldim` of thomasahle/cce; also one feature of
Ginart et al., arXiv 1909.11810, whose `mixed_dim` chooses d by a rule of its own). d = D is the dense table.

Differs from the code of `ldim`: the projection has no bias. A bias is added once per id, so it would be multiplied by
the length of a bag where projection comes before pooling, and not where it comes after; without it both are the same.
Projection and table start so that composed entries have the asked variance: d products of variances std^2 and 1 / d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, ArraySpec, Encoding, PartInit, Solution, Spec, fill
from embtab.methods.dense import dense_solution


@dataclass(frozen=True)
class LowRank(Encoding):
    """The id's row of a table of width `rank`, projected to D."""

    rank: int

    method: ClassVar[str] = "lowrank"

    def arrays(self) -> dict[str, ArraySpec]:
        """The projection [rank, D]."""
        return {"projection": ArraySpec((self.rank, self.dim), std=self.rank**-0.5)}

    def constants(self) -> dict[str, tuple[int, ...]]:
        """None are needed."""
        return {}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The id itself."""
        return ids

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The projected row."""
        return parts[0] @ arrays["projection"]

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: the projection keeps the variance."""
        return [PartInit(0.0, std)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """The largest rank that fits each space's share; spaces that would not shrink stay dense."""

        def nbytes(space: Feature, rank: int) -> int:
            return space.num_ids * spec.row_bytes(rank) + rank * spec.dim * 4

        def choose(space: Feature, target: int) -> Solution:
            fitting = [rank for rank in range(1, spec.dim) if nbytes(space, rank) <= target]
            rank = max(fitting, default=1)
            if target >= spec.dense_bytes(space) or nbytes(space, rank) >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            encoding = cls(spec.dim, space.num_ids, (space.name,), rank)
            return Solution([encoding], [spec.table(space.name, space.num_ids, rank)])

        return fill(spaces, budget, spec, cls.method, choose)
