"""Tensor train: a table is the product of three small cores, and no row of it is stored.

Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021, arXiv 2101.11714.
With num_ids <= p1 p2 p3 and D = q1 q2 q3, id x is written in mixed radix as (i1, i2, i3) and

    e(x)[j1, j2, j3] = sum over r1, r2 of  G1[i1, j1, r1] * G2[i2, r1, j2, r2] * G3[i3, r2, j3]

A core is a physical table: p1 rows of q1 R1 numbers, p2 of R1 q2 R2, p3 of R2 q3. A million ids at D = 16 with
p = (100, 100, 100), q = (2, 2, 4) and both ranks 16 take 60,800 numbers instead of 16 million. Vectors are formed per
id, before bags are pooled.

Differs from the reference code (facebookresearch/FBTT-Embedding), which is CUDA-only: an id of num_ids or above is
refused even where it is below p1 p2 p3; the two ranks may differ by one, which halves the steps in which a budget can
be used; and cores start Gaussian with the variance that gives composed entries the dense table's, exactly, the second
and third around a mean above zero: with three means of zero, all first gradients are products of two small numbers,
and under a product of two such tables (matrix factorisation) one seed of two never left the start (measured). There is
no cache of hot rows: a frequency cut is a method of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import Table

Three = tuple[int, int, int]


@dataclass(frozen=True)
class TensorTrain(Encoding):
    """Three rows of three cores, contracted over the ranks."""

    p: Three
    q: Three
    ranks: tuple[int, int]

    method: ClassVar[str] = "tt"

    @property
    def linear(self) -> bool:
        """A product of sums is not the sum of products."""
        return False

    @property
    def variant(self) -> tuple:
        """The shapes of the cores' rows."""
        return (self.q, self.ranks)

    def check(self) -> None:
        """The digits reach every id, and the factors make a vector."""
        require(
            min(*self.p, *self.q, *self.ranks) >= 1, f"p {self.p}, q {self.q} and ranks {self.ranks} must be positive"
        )
        require(self.bounded_ids <= math.prod(self.p) < 2**63, f"p {self.p} does not reach {self.num_ids} ids")
        require(math.prod(self.q) == self.dim, f"q {self.q} is not {self.dim} numbers")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per digit, of the core's numbers."""
        (q1, q2, q3), (r1, r2) = self.q, self.ranks
        return list(zip(self.p, (q1 * r1, r1 * q2 * r2, r2 * q3), strict=True))

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The digits of the mixed radix, as (id // stride) % modulus."""
        _, p2, p3 = self.p
        return {"stride": (p2 * p3, p3, 1), "modulus": self.p}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The three digits of the id."""
        return (ids // c["stride"]) % c["modulus"]

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The contraction, from the left."""
        (q1, q2, q3), (r1, r2) = self.q, self.ranks
        first, second, third = parts
        some = first.shape[:-1]
        left = first.reshape(*some, q1, r1) @ second.reshape(*some, r1, q2 * r2)
        return (left.reshape(*some, q1 * q2, r2) @ third.reshape(*some, r2, q3)).reshape(*some, self.dim)

    def start(self, std: float) -> Sequence[PartInit]:
        """All cores start with one mean square, two and three around a mean m of their own spread.

        E[entry^2] = E[g1^2] R1 sum over b, b' of E[g2_b g2_b'] E[g3_b g3_b'], where E[g_b g_b'] = m^2 + (b = b') m^2
        and E[g1^2] = 2 m^2.
        """
        r1, r2 = self.ranks
        mean = (std**2 / (2 * r1 * r2 * (r2 + 3))) ** (1 / 6)
        return [PartInit(0.0, 2**0.5 * mean), PartInit(mean, mean), PartInit(mean, mean)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """The largest ranks that fit each space's share; spaces that would not shrink stay dense."""
        q = factors(spec.dim)

        def cores(space: Feature, p: Three, total: int) -> list[Table]:
            """For ranks of this sum."""
            r1, r2 = total // 2, total - total // 2
            widths = (q[0] * r1, r1 * q[1] * r2, r2 * q[2])
            return [spec.table(f"{space.name}@core{k + 1}", p[k], widths[k]) for k in range(3)]

        def nbytes(space: Feature, p: Three, total: int) -> int:
            return sum(core.nbytes for core in cores(space, p, total))

        def choose(space: Feature, target: int) -> Solution:
            p, dense = radices(space.num_ids), spec.dense_bytes(space)
            low, high = 2, 4
            while nbytes(space, p, high) <= min(target, dense):
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if nbytes(space, p, middle) <= target else (low, middle)
            tables = cores(space, p, low)
            if dense <= max(target, sum(core.nbytes for core in tables)):
                return dense_solution(space, spec)
            names = tuple(core.name for core in tables)
            return Solution([cls(spec.dim, space.num_ids, names, p, q, (low // 2, low - low // 2))], tables)

        return fill(spaces, budget, spec, cls.method, choose)


@cache
def factors(dim: int) -> Three:
    """Three factors of `dim`, rising, with the smallest sum: 16 -> (2, 2, 4)."""
    divisors = [d for d in range(1, dim + 1) if dim % d == 0]
    triples = [(a, b, dim // (a * b)) for a in divisors for b in divisors if a <= b <= dim // (a * b)]
    return min((each for each in triples if each[0] * each[1] * each[2] == dim), key=sum)


def radices(num_ids: int) -> Three:
    """Three balanced numbers whose product reaches `num_ids`: 1,000,000 -> (100, 100, 100)."""
    first = _root(num_ids, 3)
    second = _root(-(-num_ids // first), 2)
    return first, second, -(-num_ids // (first * second))


def _root(n: int, degree: int) -> int:
    """The smallest whole number whose power of `degree` is at least n, exactly."""
    root = max(round(n ** (1 / degree)) - 1, 1)
    while root**degree < n:
        root += 1
    return root
