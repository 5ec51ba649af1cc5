"""Low rank: a narrow table and one projection without bias, in place of a wide table.

    vector(id) = T[id] P        T [n, d], P [d, D], 1 <= d < D
    vector(id) = T[id] P + b    with `bias`, b [D]

The strongest of the simple baselines as long as a number per id fits (`ldim` of thomasahle/cce; also one feature of
Ginart et al., arXiv 1909.11810, whose `mixed_dim` chooses d by a rule of its own). d = D is the dense table.

Differs from the code of `ldim`, whose projection has a bias and follows pooling: a bias belongs to an id's vector, like
all else, so a sum over a bag holds it once per id. Bags are then composed id by id; without a bias, which is the
default, they are pooled while narrow. A bias pays where vectors meet in a product (matrix factorisation: it holds what
is common to all users, and what remains of an item beside it is the item's own bias).
Projection and table start so that composed entries have the asked variance: d products of variances std^2 and 1 / d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec


@dataclass(frozen=True)
class LowRank(Encoding):
    """The id's row of a table of width `rank`, projected to D, and a bias if asked for."""

    rank: int
    bias: bool = False

    method: ClassVar[str] = "lowrank"

    @property
    def linear(self) -> bool:
        """A bias is added once per id, not once per bag."""
        return not self.bias

    def arrays(self) -> dict[str, ArraySpec]:
        """The projection [rank, D] and the bias [D], which starts at zero."""
        projection = {"projection": ArraySpec((self.rank, self.dim), std=self.rank**-0.5)}
        return projection | {"bias": ArraySpec((self.dim,))} if self.bias else projection

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A narrow row per id."""
        return [(self.bounded_ids, self.rank)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """None are needed."""
        return {}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The id itself."""
        return ids

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The projected row, and the bias."""
        vectors = parts[0] @ arrays["projection"]
        return vectors + arrays["bias"] if self.bias else vectors

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: the projection keeps the variance."""
        return [PartInit(0.0, std)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, bias: bool = False) -> Solution:
        """The largest rank that fits each space's share; spaces that would not shrink stay dense.

        Args:
            spaces: the id spaces.
            budget: serving bytes; None for no limit.
            spec: dimension and precision; projection and bias are float32 whatever the precision of rows.
            bias: whether vectors have a bias.
        """

        def nbytes(space: Feature, rank: int) -> int:
            return space.num_ids * spec.row_bytes(rank) + (rank + bias) * spec.dim * 4

        def choose(space: Feature, target: int) -> Solution:
            fitting = [rank for rank in range(1, spec.dim) if nbytes(space, rank) <= target]
            rank = max(fitting, default=1)
            if target >= spec.dense_bytes(space) or nbytes(space, rank) >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            encoding = cls(spec.dim, space.num_ids, (space.name,), rank, bias)
            return Solution([encoding], [spec.table(space.name, space.num_ids, rank)])

        return fill(spaces, budget, spec, cls.method, choose)
