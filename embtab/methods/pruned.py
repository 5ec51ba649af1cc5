"""Pruned rows: only some ids keep a row, and rows may be narrower than D; everything else of a vector is zero.

The form that OptEmbed's search ends in (Lyu et al., CIKM 2022, arXiv 2208.04482): a row map and narrow tables,

    vector(id) = row(id) ++ 0 ... 0   for ids that keep a row,      0   for the others

No map is stored where the ids that keep a row are the first ones, as they are in prepared datasets where frequency
decides. Otherwise a counting bitmap finds rows in 12 bytes per 64 ids (`embtab.methods.bitmap`; a table of int32 rows
would take 256).

Without a search, frequency decides: as many of the most frequent ids as fit keep a row, D or `width` wide. It is the
plainest way to spend bytes where the occurrences are, and every id that is left out is one and the same to the model.
What a search found comes in through `embtab.learned.forms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.methods import bitmap as bitmaps
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.bitmap import bitmap, locate, some, specs
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec


@dataclass(frozen=True)
class Pruned(Encoding):
    """One narrow row for ids that kept one.

    Args:
        width: of the rows.
        num_rows: ids that keep a row.
        mapped: whether a bitmap says which; else it is the first `num_rows` ids.
        kept: bool [num_ids], if mapped. Without it, in a plan that was read from a file, ids are drawn at random until
            a state is loaded.
    """

    width: int
    num_rows: int
    mapped: bool
    kept: np.ndarray | None = field(default=None, compare=False, repr=False)

    method: ClassVar[str] = "pruned"

    @property
    def may_skip(self) -> bool:
        """Unless every id keeps a row."""
        return self.num_rows < self.bounded_ids

    @property
    def variant(self) -> tuple:
        """Where every id has a row, nothing asks whether one is there."""
        return (self.may_skip,)

    def arrays(self) -> dict[str, ArraySpec]:
        """The bitmap of ids, if mapped."""
        return specs(self.bounded_ids, "", "row map") if self.mapped else {}

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """The bitmap."""
        kept = some(self.bounded_ids, self.num_rows, generator) if self.kept is None else self.kept
        return dict(zip(("bits", "starts"), bitmap(kept), strict=True))[name]

    def check(self) -> None:
        """No more rows than ids, none wider than a vector."""
        require(1 <= self.num_rows <= self.bounded_ids, f"{self.num_rows} rows of {self.num_ids} ids")
        require(1 <= self.width <= self.dim, f"width {self.width} of {self.dim}")

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The bitmap keeps as many ids as there are rows."""
        if self.mapped:
            bitmaps.check(arrays["bits"], arrays["starts"], self.bounded_ids, self.num_rows)

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per id that keeps one."""
        return [(self.num_rows, self.width)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """How many rows there are."""
        return {"num_rows": (self.num_rows,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The id's place among those that keep a row, or -1."""
        if "bits" in c:
            return locate(c["bits"], c["starts"], ids)
        return (ids + 1) * (ids < c["num_rows"]) - 1

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row, filled up with zeros."""
        return F.pad(parts[0], (0, self.dim - self.width)) if self.width < self.dim else parts[0]

    def start(self, std: float) -> Sequence[PartInit]:
        """Wider than asked for by the share of entries that are there, as the others are zero."""
        return [PartInit(0.0, std * math.sqrt(self.bounded_ids * self.dim / (self.num_rows * self.width)))]

    def colliding(self, num_ids: int) -> float:
        """The ids without a row, all zero."""
        return float(num_ids - self.num_rows) if num_ids - self.num_rows > 1 else 0.0

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, width: int | None = None) -> Solution:
        """As many of the most frequent ids as fit; spaces that would not shrink stay dense.

        Args:
            spaces: the id spaces; without counts, ids count as numbered by falling frequency.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.
            width: of the rows; D if None.

        Raises:
            InfeasibleBudget: for less than a row per space.
            UserError: for a width outside [1, D].
        """
        wide = spec.dim if width is None else width
        if not 1 <= wide <= spec.dim:
            raise UserError(f"pruned: width must be a whole number within 1 and {spec.dim}; got {width!r}")
        orders = {space.name: _by_frequency(space) for space in spaces}

        def choose(space: Feature, target: int) -> Solution:
            order = orders[space.name]
            map_bytes = 0 if order is None else sum(each.nbytes for each in specs(space.num_ids, "", "").values())
            num_rows = max((target - map_bytes) // spec.row_bytes(wide), 1)
            if num_rows >= space.num_ids:
                num_rows, order = space.num_ids, None
            kept = None
            if order is not None:
                kept = np.zeros(space.num_ids, dtype=bool)
                kept[order[:num_rows]] = True
            solution = pruned_solution(space, wide, num_rows, kept, spec)
            if solution.nbytes < spec.dense_bytes(space) and target < spec.dense_bytes(space):
                return solution
            return dense_solution(space, spec)

        return fill(spaces, budget, spec, cls.method, choose)


def pruned_solution(space: Feature, width: int, num_rows: int, kept: np.ndarray | None, spec: Spec) -> Solution:
    """Rows of `width` for the ids of `kept`, bool [num_ids]; or, where it is None, for the first `num_rows` ids."""
    encoding = Pruned(spec.dim, space.num_ids, (space.name,), width, num_rows, kept is not None, kept)
    return Solution([encoding], [spec.table(space.name, num_rows, width)])


def _by_frequency(space: Feature) -> np.ndarray | None:
    """Ids by falling counts, int64 [num_ids]; None where they are numbered so (id 0 may stand for all rare values)."""
    if space.counts is None or not np.any(np.diff(space.counts[1:]) > 0):
        return None
    return np.argsort(-space.counts, kind="stable")
