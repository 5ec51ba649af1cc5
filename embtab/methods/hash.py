"""Hashing trick: every id space has a smaller table of its own, and ids share its rows by a seeded hash.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv 0902.2206; rows in proportion
to cardinality, as the baseline of arXiv 2305.12102. Unlike the usual `id % rows`, the hash is seeded by the feature's
name, so that two features never repeat each other's collisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require_hashable
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill


@dataclass(frozen=True)
class Hash(Encoding):
    """One hashed row per id; any int64 is an id."""

    seed: int
    num_rows: int

    method: ClassVar[str] = "hash"
    arithmetic: ClassVar[str | None] = "hash"
    bare: ClassVar[bool] = True

    def check(self) -> None:
        """Ids can be hashed to so many rows."""
        require_hashable(self.num_rows)

    def shapes(self) -> Sequence[tuple[int, int]]:
        """The rows that ids are hashed to."""
        return [(self.num_rows, self.dim)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The seed and the number of rows."""
        return {"seed": (self.seed,), "num_rows": (self.num_rows,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The seeded hash of the id."""
        return hash_rows(ids, c["seed"], c["num_rows"])

    def colliding(self, num_ids: int) -> float:
        """Ids of one row."""
        return expected_collisions(num_ids, self.num_rows)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row itself."""
        return parts[0]

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: a vector is one row."""
        return [PartInit(0.0, std)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """Rows in proportion to cardinality, at least one per space; spaces that would not shrink stay dense."""

        def choose(space: Feature, target: int) -> Solution:
            num_rows = min(max(target // spec.row_bytes(spec.dim), 1), MAX_ROWS)
            if num_rows >= space.num_ids and not space.hashed:
                return dense_solution(space, spec)
            encoding = cls(spec.dim, None, (space.name,), seed_of(space.name, 0, spec.seed), num_rows)
            return Solution([encoding], [spec.table(space.name, num_rows, spec.dim)])

        return fill(spaces, budget, spec, cls.method, choose)
