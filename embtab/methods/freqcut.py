"""Frequency cut: frequent ids have rows of their own, all others share the rest of the table by a seeded hash.

The oldest remedy for collisions: a collision costs most where an id is frequent, and ids are Zipf-distributed, so a
few exact rows cover most occurrences. It is a baseline that any learned method has to beat (compare Zhang et al., VLDB
2024, arXiv 2311.15578). Prepared datasets number ids by falling frequency, so the hot ids are the first ones and no map
is stored:

    row(x) = x                                  for 0 <= x < hot
    row(x) = hot + hash(x) mod (rows - hot)     for every other int64

How many ids are hot: with counts, as many as leave the fewest colliding pairs of occurrences. With C occurrences of the
other ids on T rows these are about C^2 / 2T, so hot minimises C(hot)^2 / (rows - hot) over 64 values of hot. Evenly
frequent ids then get no hot rows, Zipf-distributed ones about half. Without counts, half of the rows are hot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require, require_hashable
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill

HOT_WITHOUT_COUNTS = 0.5
"""The share of rows for hot ids where nothing is known of their frequency."""
IN_ORDER = 0.9
"""The first ids, as many as there are rows, must occur at least this share of what the most frequent ones do."""


@dataclass(frozen=True)
class FreqCut(Encoding):
    """The id itself below `hot`, a hashed row above; any int64 is an id."""

    seed: int
    hot: int
    num_rows: int

    method: ClassVar[str] = "freqcut"
    bare: ClassVar[bool] = True

    def check(self) -> None:
        """The ids that are not hot have a row."""
        require_hashable(self.num_rows - self.hot)
        require(0 <= self.hot < self.num_rows, f"{self.hot} hot ids of {self.num_rows} rows")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per hot id, and the shared rows behind them."""
        return [(self.num_rows, self.dim)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The seed, the number of hot ids and the number of rows that the others share."""
        return {"seed": (self.seed,), "hot": (self.hot,), "shared": (self.num_rows - self.hot,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The id for hot ids, else a hashed row behind theirs."""
        is_hot = (ids >= 0) & (ids < c["hot"])
        hashed = c["hot"] + hash_rows(ids, c["seed"], c["shared"])
        return hashed + is_hot * (ids - hashed)

    def colliding(self, num_ids: int) -> float:
        """Ids of one row among those that are not hot."""
        return expected_collisions(max(num_ids - self.hot, 0), self.num_rows - self.hot)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row itself."""
        return parts[0]

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: a vector is one row."""
        return [PartInit(0.0, std)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, hot: float | None = None) -> Solution:
        """Rows in proportion to cardinality, at least one per space; spaces that would not shrink stay dense.

        Args:
            spaces: the id spaces; their counts, where known, decide how many ids are hot.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.
            hot: share of the rows for hot ids, in [0, 1); None to decide by counts.

        Raises:
            InfeasibleBudget: for less than a row per space.
            UserError: where ids are not numbered by falling frequency, or for a share that makes no sense.
        """
        if hot is not None and not 0 <= hot < 1:
            raise UserError(f"freqcut: hot must be a share of the rows, at least 0 and below 1; got {hot!r}")
        # As floats: squares of counts exceed int64.
        covered = {
            space.name: np.concatenate([[0.0], np.cumsum(space.counts, dtype=float)])
            for space in spaces
            if space.counts is not None
        }

        def choose(space: Feature, target: int) -> Solution:
            if space.hashed:
                raise UserError(
                    f"feature {space.name!r}: its ids are any 64-bit numbers (hashed), not numbered by falling "
                    "frequency as freqcut needs them; choose hash, unified or cafe for it"
                )
            num_rows = min(max(target // spec.row_bytes(spec.dim), 1), MAX_ROWS)
            if num_rows >= space.num_ids:
                return dense_solution(space, spec)
            hot_rows = _hot(num_rows, hot, covered.get(space.name))
            encoding = cls(spec.dim, None, (space.name,), seed_of(space.name, 0, spec.seed), hot_rows, num_rows)
            return Solution([encoding], [spec.table(space.name, num_rows, spec.dim)])

        solution = fill(spaces, budget, spec, cls.method, choose)
        for space, encoding in zip(spaces, solution.encodings, strict=True):
            if isinstance(encoding, FreqCut):
                _check_order(space, encoding.num_rows)
        return solution


def _hot(num_rows: int, share: float | None, covered: np.ndarray | None) -> int:
    """How many of the rows are for hot ids; at least one row is left for the others.

    Args:
        num_rows: rows of the table, fewer than ids.
        share: of the rows; None to decide by counts.
        covered: float64 [num_ids + 1], how many occurrences the first ids have together; None if unknown.
    """
    if share is not None or covered is None:
        return int((HOT_WITHOUT_COUNTS if share is None else share) * num_rows)
    candidates = np.arange(64) * num_rows // 64
    left = covered[-1] - covered[candidates]
    return int(candidates[np.argmin(left**2 / (num_rows - candidates))])


def _check_order(space: Feature, num_rows: int) -> None:
    """Refuses counts that show that the frequent ids are not the first; id 0 may stand for all rare values."""
    if space.counts is None or num_rows < 2:
        return
    others = space.num_ids - num_rows
    first = space.counts[1:num_rows].sum()
    most = np.partition(space.counts[1:], others)[others:].sum()
    if first < IN_ORDER * most:
        raise UserError(
            f"freqcut: the ids of {space.name!r} are not numbered by falling frequency: ids 1 to {num_rows - 1} "
            f"occur {first} times, but the {num_rows - 1} most frequent ones {most} times; renumber them as "
            "`embtab prepare` does"
        )
