"""Mixed dimension: the more popular an id, the wider its row; narrow rows are projected to D without a bias.

Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", ISIT 2021,
arXiv 1909.11810. Popularity is known by feature (an id of a feature of n ids is looked up every n-th time) or, with
counts, by block of ids within a feature. Either way, with temperature alpha,

    d = scale * n^-alpha, rounded, within [1, D]        vector(id) = T_d[row] P_d,  T_d [rows, d],  P_d [d, D]

where a block's n is its rows divided by its share of the feature's occurrences: the cardinality of a feature whose ids
are all as popular as the block's on average. Blocks fall in popularity and have equal shares of the occurrences.

Differs from the published solver (facebookresearch/dlrm, tricks/md_embedding_bag.py):
- The budget holds: the scale is bisected on the bytes of what would be built, projections and row maps included, after
  rounding and clamping (the solver divides the budget once and then rounds and clamps, and exceeds it up to 12 times).
- Widths are whole numbers within [1, D], also when rounded to powers of two (the solver gives floats above D).
- What no block of the next width fits into is spent on the more popular blocks, so widths still fall with n.
- Where a projection would take more than it saves the rows are D wide.

Ids numbered by falling frequency, as prepared datasets have them, need no map to find their block. Others are mapped to
their rank: int32, counted. A space whose blocks would take more than one table as wide as the first gets that table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from torch import Tensor

from embtab.errors import UserError, shown
from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import Dense, dense_solution
from embtab.methods.solver import infeasible
from embtab.methods.storage import ArraySpec

ENOUGH = 0.99
"""The share of the budget beyond which the solver stops looking for a use of what is left."""
IN_ORDER = 0.9
"""Ids count as numbered by frequency if each block's end covers this share of what the most frequent ids would."""


@dataclass(frozen=True)
class MixedDim(Encoding):
    """One part per block; an id has the part of its own block alone.

    Args:
        widths: of the blocks' rows, falling.
        starts: the first id of each block; or the first rank, if mapped.
        mapped: whether ids are mapped to ranks.
        ranks: int32 [num_ids], the rank of each id by falling count, if mapped. Without it, in a plan that was read
            from a file, ids are their own ranks until a state is loaded.
    """

    widths: tuple[int, ...]
    starts: tuple[int, ...]
    mapped: bool
    ranks: np.ndarray | None = field(default=None, compare=False, repr=False)

    method: ClassVar[str] = "mixed_dim"

    @property
    def may_skip(self) -> bool:
        """With several blocks an id has one of the parts."""
        return len(self.widths) > 1

    def arrays(self) -> dict[str, ArraySpec]:
        """A projection [d, D] per block narrower than D, and the ranks."""
        narrow = {f"projection{b}": width for b, width in enumerate(self.widths) if width < self.dim}
        arrays = {name: ArraySpec((width, self.dim), std=width**-0.5) for name, width in narrow.items()}
        if self.mapped:
            arrays["ranks"] = ArraySpec((self.bounded_ids,), "int32", part="row map")
        return arrays

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """The ranks."""
        return np.arange(self.bounded_ids, dtype=np.int32) if self.ranks is None else self.ranks

    def check(self) -> None:
        """Blocks follow each other, and none is wider than a vector."""
        stops = (*self.starts[1:], self.bounded_ids)
        rising = self.starts[:1] == (0,) and all(a < b for a, b in zip(self.starts, stops, strict=True))
        require(rising, f"starts do not rise from 0 to {self.num_ids}: {shown(self.starts)}")
        require(len(self.widths) == len(self.starts), f"{len(self.widths)} widths for {len(self.starts)} starts")
        require(all(1 <= width <= self.dim for width in self.widths), f"widths beyond {self.dim}: {shown(self.widths)}")

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Ranks are those of ids."""
        for name, ranks in arrays.items():
            if name == "ranks" and ranks.size:
                require(ranks.min() >= 0 and ranks.max() < self.bounded_ids, "a rank is not that of an id")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per id of the block."""
        stops = (*self.starts[1:], self.bounded_ids)
        return [(b - a, width) for a, b, width in zip(self.starts, stops, self.widths, strict=True)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Where each block starts and stops."""
        return {"start": self.starts, "stop": (*self.starts[1:], self.bounded_ids)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The place within the id's block; -1 for the other blocks."""
        at = c["ranks"][ids] if "ranks" in c else ids
        inside = (at >= c["start"]) & (at < c["stop"])
        return (at - c["start"] + 1) * inside - 1

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The sum of the projected parts, all zero but one."""
        names = [f"projection{b}" for b in range(len(parts))]
        wide = [part @ arrays[name] if name in arrays else part for name, part in zip(names, parts, strict=True)]
        return sum(wide[1:], start=wide[0])

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: projections keep the variance."""
        return [PartInit(0.0, std)] * len(self.widths)

    @classmethod
    def solve(
        cls,
        spaces: Sequence[Feature],
        budget: int | None,
        spec: Spec,
        *,
        alpha: float = 0.3,
        blocks: int = 1,
        power_of_two: bool = False,
    ) -> Solution:
        """The largest scale that fits; spaces that would not shrink stay dense."""
        if not 0 <= alpha <= 1:
            raise UserError(f"mixed_dim: alpha must lie in [0, 1]; got {alpha!r}")
        if blocks < 1:
            raise UserError(f"mixed_dim: blocks must be a positive whole number; got {blocks!r}")
        dense = Dense.solve(spaces, None, spec)
        if budget is None or dense.nbytes <= budget:
            return dense
        cuts = [popularity_blocks(space, blocks) for space in spaces]
        widths = _Solver(cuts, spec, alpha, power_of_two).widths(budget)
        each = [_solution(*one, spec) for one in zip(spaces, cuts, widths, strict=True)]
        return Solution([one.encodings[0] for one in each], [table for one in each for table in one.tables])


def power_rule(n: Sequence[float] | np.ndarray, alpha: float, scale: Array, dim: int, power_of_two: bool) -> np.ndarray:
    """int64, like n: the widths `scale * n^-alpha` within [1, dim].

    Args:
        n: cardinalities, of features or (see above) of blocks.
        alpha: temperature; 0 makes all widths equal.
        scale: a number, or one per cardinality. `d * min(n)**alpha` gives the smallest the width d.
        dim: D.
        power_of_two: round to powers of two.
    """
    widths = np.clip(np.rint(scale * np.asarray(n, dtype=float) ** -alpha), 1, dim)
    if power_of_two:
        widths = np.minimum(2 ** np.rint(np.log2(widths)), dim)
    return widths.astype(np.int64)


@dataclass(frozen=True)
class PopularityBlocks:
    """The blocks of an id space: first ids (or ranks), numbers of rows, cardinalities, and ranks if they are needed."""

    starts: list[int]
    rows: list[int]
    n: list[float]
    ranks: np.ndarray | None


def popularity_blocks(space: Feature, blocks: int) -> PopularityBlocks:
    """Blocks of falling popularity and equal shares of the occurrences; fewer where single ids have larger shares.

    Raises:
        UserError: for two or more blocks of a space whose counts are unknown.
    """
    if blocks == 1:
        return PopularityBlocks([0], [space.num_ids], [float(space.num_ids)], None)
    if space.counts is None:
        raise UserError(
            f"mixed_dim: blocks={blocks} needs to know how often each id of feature {space.name!r} occurs; give the "
            "feature counts (those of a prepared dataset have them) or use blocks=1"
        )
    counts, ranks = np.maximum(space.counts, 1), None  # an id never seen may still come
    ends = _ends(counts, blocks)
    # Id 0 may stand for all rare values; it is not asked to be in order.
    if np.any(np.diff(counts[1:]) > 0):
        falling, first = np.cumsum(np.sort(counts[1:])[::-1]), np.cumsum(counts[1:])
        at = np.maximum(ends[:-1] - 2, 0)
        if np.any(first[at] < IN_ORDER * falling[at]):
            order = np.argsort(-counts, kind="stable")
            ranks = np.empty(space.num_ids, dtype=np.int32)
            ranks[order] = np.arange(space.num_ids, dtype=np.int32)
            counts = counts[order]
            ends = _ends(counts, blocks)
    starts = [0, *ends[:-1].tolist()]
    rows = np.diff([0, *ends])
    n = np.maximum.accumulate(rows * float(counts.sum()) / np.add.reduceat(counts, starts))
    return PopularityBlocks(starts, rows.tolist(), n.tolist(), ranks)


def _ends(counts: np.ndarray, blocks: int) -> np.ndarray:
    """Where blocks of equal shares of the counts end; the last at the number of ids."""
    total = np.cumsum(counts)
    shares = total[-1] * np.arange(1, blocks) / blocks
    return np.unique([*(np.searchsorted(total, shares) + 1), len(counts)])


class _Solver:
    """Widths [S, K] of the blocks of all spaces, K the most blocks of any; missing ones have no rows."""

    def __init__(self, cuts: Sequence[PopularityBlocks], spec: Spec, alpha: float, power_of_two: bool) -> None:
        most = max(len(cut.rows) for cut in cuts)
        self.rows = np.array([cut.rows + [0] * (most - len(cut.rows)) for cut in cuts])
        self.n = np.array([cut.n + [np.inf] * (most - len(cut.n)) for cut in cuts])
        self.ids = self.rows.sum(axis=1)
        self.maps = np.array([0 if cut.ranks is None else cut.ranks.nbytes for cut in cuts])
        self.dim, self.alpha, self.power_of_two = spec.dim, alpha, power_of_two
        self.row_bytes = np.array([spec.row_bytes(width) for width in range(spec.dim + 1)])

    def built(self, scale: np.ndarray) -> tuple[np.ndarray, int]:
        """The widths that would be built for scales [S, K], and the bytes they take."""
        widths = power_rule(self.n, self.alpha, scale, self.dim, self.power_of_two)
        full = self.rows * self.row_bytes[self.dim]
        narrow = np.where(self.rows > 0, self.rows * self.row_bytes[widths] + 4 * widths * self.dim, 0)
        wide = np.logical_and.accumulate(narrow >= full, axis=1)  # from the head on, so that widths fall
        apart = np.where(wide, full, narrow).sum(axis=1) + self.maps
        level = widths[:, 0]
        one_narrow = self.ids * self.row_bytes[level] + 4 * level * self.dim
        one_wide = self.ids * self.row_bytes[self.dim]
        one = np.minimum(one_narrow, one_wide)
        level = np.where(one_wide <= one_narrow, self.dim, level)
        widths = np.where((one <= apart)[:, None], level[:, None], np.where(wide, self.dim, widths))
        return widths, int(np.minimum(one, apart).sum())

    def widths(self, budget: int) -> np.ndarray:
        """The widths of the largest scale that fits; then the same for the blocks more popular than what stopped it.

        Raises:
            InfeasibleBudget: when rows of width 1 do not fit.
        """
        scale = np.zeros(self.n.shape)
        smallest = self.built(scale)[1]
        if smallest > budget:
            raise infeasible(MixedDim.method, budget, smallest)
        active = np.isfinite(self.n)
        while active.any() and self.built(scale)[1] < ENOUGH * budget:
            low, high = scale[active].min(), 2 * self.dim * self.n[active].max() ** self.alpha
            if self.built(np.where(active, high, scale))[1] <= budget:
                low = high
            for _ in range(64):
                middle = (low + high) / 2
                fits = self.built(np.where(active, middle, scale))[1] <= budget
                low, high = (middle, high) if fits else (low, middle)
            larger, scale = np.where(active, high, scale), np.where(active, low, scale)
            grown = self._asked(larger) > self._asked(scale)
            active &= self.n < self.n[grown].max(initial=0)
        return self.built(scale)[0]

    def _asked(self, scale: np.ndarray) -> np.ndarray:
        return power_rule(self.n, self.alpha, scale, self.dim, self.power_of_two)


def _solution(space: Feature, cut: PopularityBlocks, widths: np.ndarray, spec: Spec) -> Solution:
    """One space's tables: dense, one narrow table, or a table per block."""
    if np.all(widths == spec.dim):
        return dense_solution(space, spec)
    used = tuple(widths[: len(cut.rows)].tolist())
    if len(set(widths.tolist())) == 1:
        encoding = MixedDim(spec.dim, space.num_ids, (space.name,), used[:1], (0,), False)
        return Solution([encoding], [spec.table(space.name, space.num_ids, used[0])])
    first = max(used.count(spec.dim) - 1, 0)  # blocks of width D are one
    used, starts = used[first:], (0, *cut.starts[first + 1 :])
    bounds = enumerate(pairwise([*starts, space.num_ids]))
    tables = [spec.table(f"{space.name}@block{b}", stop - start, used[b]) for b, (start, stop) in bounds]
    names, mapped = tuple(table.name for table in tables), cut.ranks is not None
    return Solution([MixedDim(spec.dim, space.num_ids, names, used, starts, mapped, cut.ranks)], tables)
