"""Complementary partitions: k small tables whose rows, together, are unique for every id.

Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
KDD 2020, arXiv 1909.02107. Part j of id i is row (i // stride_j) % m_j of its table; the k rows are concatenated, added
or multiplied. Two families (section 3.1 of the paper) make k-tuples of rows unique if m_1 * ... * m_k >= n:

    radix   stride_j = m_1 * ... * m_(j-1): the digits of i in a mixed radix; quotient-remainder (`qr`) is k = 2
    crt     stride_j = 1, moduli pairwise co-prime: the residues of i (Chinese remainder theorem)

The smallest form has balanced moduli, k * n^(1/k) rows. The paper says nothing of larger budgets; here

- radix gives what is left to m_1 and keeps the other moduli as small as uniqueness allows: ids below m_1, which a
  vocabulary sorted by frequency gives to the most frequent values, then differ in the first part alone;
- crt keeps the moduli balanced, since every residue tells all ids below its modulus apart.

Differs from published code (facebookresearch/dlrm) as `qr` does: products are formed per id before a bag is pooled,
integer division is exact, parts start with zero mean and the composed variance, and concatenation keeps D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from operator import mul
from typing import ClassVar

import torch
from torch import Tensor

from embtab.errors import UserError, shown
from embtab.features import Feature
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill

KINDS = ("radix", "crt")
OPS = ("concat", "sum", "product")
MOST_PARTS = 8


@dataclass(frozen=True)
class Partitions(Encoding):
    """One row per modulus.

    Raises:
        UserError: for moduli that do not tell all ids apart.
    """

    moduli: tuple[int, ...]
    kind: str
    op: str

    method: ClassVar[str] = "partitions"
    arithmetic: ClassVar[str | None] = "digit"

    def __post_init__(self) -> None:
        if not 1 <= len(self.moduli) <= MOST_PARTS or min(self.moduli) < 1:
            raise UserError(f"partitions: 1 to {MOST_PARTS} moduli of at least 1; got {shown(self.moduli)}")
        if self.num_ids is None or math.prod(self.moduli) < self.num_ids:
            raise UserError(f"partitions: the product of moduli {self.moduli} must reach the {self.num_ids} ids")
        if self.kind == "crt" and any(math.gcd(a, b) > 1 for a, b in combinations(self.moduli, 2)):
            raise UserError(f"partitions: moduli of kind 'crt' must be pairwise co-prime; got {self.moduli}")

    def check(self) -> None:
        """The kind is one of two, and rows can be put together."""
        require(self.kind in KINDS, f"kind is {self.kind!r}")
        part_width(self.method, self.op, self.dim, len(self.moduli))

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per digit or residue."""
        width = part_width(self.method, self.op, self.dim, len(self.moduli))
        return [(modulus, width) for modulus in self.moduli]

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
        """The way the parts become one."""
        return (self.op,)

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Every part as (id // stride) % modulus."""
        radix = tuple(accumulate((1, *self.moduli[:-1]), mul))
        return {"stride": radix if self.kind == "radix" else (1,), "modulus": self.moduli}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The block of the id in each partition, by exact integer division."""
        return (ids // c["stride"]) % c["modulus"]

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """Concatenation, sum or product of the rows."""
        return combined(self.op, parts)

    def start(self, std: float) -> Sequence[PartInit]:
        """Variances add in a sum and multiply in a product of independent zero-mean parts."""
        return [PartInit(0.0, part_std(self.op, std, len(self.moduli)))] * len(self.moduli)

    @classmethod
    def solve(
        cls,
        spaces: Sequence[Feature],
        budget: int | None,
        spec: Spec,
        *,
        kind: str = "radix",
        parts: int = 3,
        op: str = "product",
    ) -> Solution:
        """The largest moduli that fit each space's share; spaces that would not shrink stay dense."""
        if kind not in KINDS:
            raise UserError(f"partitions: kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if not 2 <= parts <= MOST_PARTS:
            raise UserError(f"partitions: parts must be a whole number from 2 to {MOST_PARTS}; got {parts!r}")
        width = part_width(cls.method, op, spec.dim, parts)
        moduli_for = radix_moduli if kind == "radix" else coprime_moduli

        def choose(space: Feature, target: int) -> Solution:
            if target >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            moduli = moduli_for(space.num_ids, parts, target // spec.row_bytes(width))
            if sum(moduli) * spec.row_bytes(width) >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            tables = [spec.table(f"{space.name}@part{j}", rows, width) for j, rows in enumerate(moduli)]
            names = tuple(table.name for table in tables)
            return Solution([cls(spec.dim, space.num_ids, names, moduli, kind, op)], tables)

        return fill(spaces, budget, spec, cls.method, choose)


def part_width(method: str, op: str, dim: int, parts: int) -> int:
    """The width of each part's rows.

    Raises:
        UserError: for an unknown `op`, or a dimension that cannot be cut into equal parts.
    """
    if op not in OPS:
        raise UserError(f"{method}: op must be one of {', '.join(OPS)}; got {op!r}")
    if op == "concat" and dim % parts:
        raise UserError(f"{method}: op 'concat' cuts dim into {parts} equal parts; got dim={dim}")
    return dim // parts if op == "concat" else dim


def combined(op: str, parts: Sequence[Tensor]) -> Tensor:
    """Concatenation, sum or product of k rows [..., W]."""
    if op == "concat":
        return torch.cat(tuple(parts), dim=-1)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part if op == "sum" else whole * part
    return whole


def part_std(op: str, std: float, parts: int) -> float:
    """The standard deviation of each of k independent zero-mean parts that gives composed entries `std`."""
    return {"concat": std, "sum": std / math.sqrt(parts), "product": std ** (1 / parts)}[op]


def radix_moduli(num_ids: int, parts: int, num_rows: int) -> tuple[int, ...]:
    """Moduli of a product of at least `num_ids` and a sum of at most `num_rows`; the smallest sum if none fits.

    The first is the largest possible; the others are balanced and falling.
    """
    rows = max(num_rows, _least_sum(num_ids, parts))
    # Up to balance, rows that move from the first modulus to the others make the product larger.
    balance = rows - -(-rows // parts)
    others = _first(lambda s: (rows - s) * _balanced_product(s, parts - 1) >= num_ids, parts - 1, balance)
    return min(rows - others, num_ids), *_balanced(others, parts - 1)


def coprime_moduli(num_ids: int, parts: int, num_rows: int) -> tuple[int, ...]:
    """Pairwise co-prime moduli, falling, of a product of at least `num_ids`, none above it.

    Their sum is the largest of at most `num_rows`; the smallest possible if none is that small. They are as balanced
    as their sum allows.
    """
    least = _least_sum(num_ids, parts)
    for rows in range(num_rows, least - 1, -1):
        found = _coprime((), rows, parts, num_ids, num_ids)
        if found:
            return found
    while not (found := _coprime((), least, parts, num_ids, num_ids)):
        least += 1
    return found


def _coprime(taken: tuple[int, ...], rows: int, parts: int, num_ids: int, most: int) -> tuple[int, ...] | None:
    """`taken` and `parts` further moduli of sum `rows`, each at most `most`, tried from balanced to lopsided."""
    if parts == 0:
        return taken
    left = -(-num_ids // math.prod(taken))
    smallest = rows if parts == 1 else -(-rows // parts)
    for modulus in range(max(smallest, 1), min(most, rows - parts + 1) + 1):
        if modulus * _balanced_product(rows - modulus, parts - 1) < left:
            return None  # the more lopsided, the smaller
        if all(math.gcd(modulus, other) == 1 for other in taken):
            found = _coprime((*taken, modulus), rows - modulus, parts - 1, num_ids, modulus)
            if found:
                return found
    return None


def _balanced(total: int, parts: int) -> tuple[int, ...]:
    """`parts` whole numbers of a sum, as equal as can be: no others have a larger product."""
    each, more = divmod(total, parts)
    return (each + 1,) * more + (each,) * (parts - more)


def _balanced_product(total: int, parts: int) -> int:
    return math.prod(_balanced(total, parts)) if parts else 1


def _least_sum(num_ids: int, parts: int) -> int:
    """The smallest sum of `parts` whole numbers whose product reaches `num_ids`."""
    return _first(lambda total: _balanced_product(total, parts) >= num_ids, parts, num_ids + parts - 1)


def _first(true: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` for which `true` holds, which it does from there on."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle + 1, high)
    return low
