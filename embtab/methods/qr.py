"""Quotient-remainder: two small tables whose rows, together, are unique for every id.

Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
KDD 2020, arXiv 1909.02107: id i reads row i // c of a quotient table and row i % c of a remainder table (c collisions);
the two are concatenated, added or multiplied.

Differs from the reference code (facebookresearch/dlrm, tricks/qr_embedding_bag.py), which pools a bag before it
multiplies (wrong for bags of two or more), divides ids as float32 (wrong above 2^24), and starts from U(sqrt(1/n), 1)
instead of +-sqrt(1/n). Here products are formed per id, division is exact, and parts start with zero mean and the
variance that gives composed entries the dense table's. Concatenation halves the rows' width, so D stays D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.partitions import combined, part_std, part_width
from embtab.methods.solver import fill


@dataclass(frozen=True)
class QR(Encoding):
    """Row id // collisions of the quotient table and row id % collisions of the remainder table."""

    collisions: int
    op: str

    method: ClassVar[str] = "qr"
    arithmetic: ClassVar[str | None] = "quotient"

    @property
    def joining(self) -> str:
        """As `op` says."""
        return self.op

    @property
    def linear(self) -> bool:
        """A product of sums is not the sum of products."""
        return self.op != "product"

    @property
    def variant(self) -> tuple:
        """The way the two parts become one."""
        return (self.op,)

    def check(self) -> None:
        """There is something to divide by, and a way to put two rows together."""
        require(self.collisions >= 1, f"collisions is {self.collisions}")
        part_width(self.method, self.op, self.dim, 2)

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per quotient, a row per remainder."""
        width = part_width(self.method, self.op, self.dim, 2)
        return [(-(-self.bounded_ids // self.collisions), width), (self.collisions, width)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """What the quotient and the id are multiplied by, to give the quotient and the remainder."""
        c = self.collisions
        return {"collisions": (c,), "quotients": (1, -c), "ids": (0, 1)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """Quotient, and remainder as id - quotient * collisions, by one exact integer division."""
        return (ids // c["collisions"]) * c["quotients"] + ids * c["ids"]

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """Concatenation, sum or product of the two rows."""
        return combined(self.op, parts)

    def start(self, std: float) -> Sequence[PartInit]:
        """Variances add in a sum and multiply in a product of independent zero-mean parts."""
        return [PartInit(0.0, part_std(self.op, std, 2))] * 2

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, op: str = "product") -> Solution:
        """The fewest collisions that fit each space's share; spaces that would not shrink stay dense."""
        width = part_width(cls.method, op, spec.dim, 2)

        def nbytes(num_ids: int, collisions: int) -> int:
            return (-(-num_ids // collisions) + collisions) * spec.row_bytes(width)

        def choose(space: Feature, target: int) -> Solution:
            n = space.num_ids
            root = math.isqrt(n)
            most = min(range(max(root - 1, 2), root + 3), key=lambda c: nbytes(n, c))
            collisions = _fewest(lambda c: nbytes(n, c) <= target, most)
            if target >= spec.dense_bytes(space) or nbytes(n, collisions) >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            quotient = spec.table(f"{space.name}@quotient", -(-n // collisions), width)
            remainder = spec.table(f"{space.name}@remainder", collisions, width)
            encoding = cls(spec.dim, n, (quotient.name, remainder.name), collisions, op)
            return Solution([encoding], [quotient, remainder])

        return fill(spaces, budget, spec, cls.method, choose)


def _fewest(fits: Callable[[int], bool], most: int) -> int:
    """The smallest number of collisions from 2 to `most` that fits, by bisection; `most` if none does."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
