"""Multi-hash: a vector is the sum of several independently hashed rows, plain or weighted.

Plain (Bloom embeddings, Serra and Karatzoglou, RecSys 2017, arXiv 1706.03993; HashEmbed of thinc and spaCy):

    e(x) = E[h1(x)] + ... + E[hk(x)]

Weighted (hash embeddings, Svenstrup, Hansen and Winther, NIPS 2017, arXiv 1709.03933), with a row of k scalars per id:

    e(x) = P[h0(x), 1] E[h1(x)] + ... + P[h0(x), k] E[hk(x)]

Two ids share a vector only when all hashes agree. By default all id spaces share E (and P), as sharing is what pays at
equal bytes (arXiv 2305.12102); `shared=False` gives every space its own and keeps spaces dense that would not shrink.

Differs from the paper: P gets half the bytes, as in the code of thomasahle/cce, but never more than a row per id; the
scalars are not appended to the vector, so D stays D; and they start at 1, so that training starts from the plain sum.
Scalars times rows are formed per id, before bags are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require, require_hashable
from embtab.methods.dense import dense_solution, shared_budget
from embtab.methods.solver import fill
from embtab.methods.storage import Table


@dataclass(frozen=True)
class MultiHash(Encoding):
    """The sum of `hashes` rows of a table, times the scalars of a row of a second table; any int64 is an id."""

    seeds: tuple[int, ...]
    num_rows: tuple[int, ...]
    weighted: bool

    method: ClassVar[str] = "multihash"
    arithmetic: ClassVar[str | None] = "hash"

    @property
    def joining(self) -> str | None:
        """Their sum, unless there are scalars."""
        return None if self.weighted else "sum"

    @property
    def linear(self) -> bool:
        """Scalars and rows are both looked up, and a product of sums is not the sum of products."""
        return not self.weighted

    @property
    def variant(self) -> tuple:
        """Whether the last part holds scalars."""
        return (self.weighted,)

    def check(self) -> None:
        """A seed for each number of rows, and a row beside the scalars."""
        for num_rows in self.num_rows:
            require_hashable(num_rows)
        require(len(self.seeds) == len(self.num_rows), f"{len(self.seeds)} seeds for {len(self.num_rows)} parts")
        require(len(self.seeds) > self.weighted, "there is no row to sum")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """Rows that are summed; where weighted, rows of a scalar for each of them."""
        hashes = len(self.num_rows) - self.weighted
        widths = [self.dim] * hashes + [hashes] * self.weighted
        return list(zip(self.num_rows, widths, strict=True))

    def constants(self) -> dict[str, tuple[int, ...]]:
        """A seed and a number of rows per part."""
        return {"seed": self.seeds, "num_rows": self.num_rows}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """One independent hash per part."""
        return hash_rows(ids, c["seed"], c["num_rows"])

    def colliding(self, num_ids: int) -> float:
        """Ids of the same rows; their order makes no difference to a sum over one table."""
        orders = 1 if self.weighted or len(set(self.tables)) > 1 else math.factorial(len(self.seeds))
        return expected_collisions(num_ids, max(math.prod(self.num_rows) // orders, 1))

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The sum of the rows, each times its scalar where there are scalars."""
        if not self.weighted:
            return torch.stack(tuple(parts)).sum(0)
        *rows, scalars = parts
        return (torch.stack(tuple(rows), dim=-1) * scalars.unsqueeze(-2)).sum(-1)

    def start(self, std: float) -> Sequence[PartInit]:
        """Variances of the rows add up; scalars are 1."""
        hashes = len(self.tables) - self.weighted
        return [PartInit(0.0, std / math.sqrt(hashes))] * hashes + [PartInit(1.0, 0.0)] * self.weighted

    @classmethod
    def solve(
        cls,
        spaces: Sequence[Feature],
        budget: int | None,
        spec: Spec,
        *,
        hashes: int = 2,
        weighted: bool = False,
        shared: bool = True,
    ) -> Solution:
        """As many rows as fit; when the dense tables fit, they are better and are taken.

        Args:
            spaces: the id spaces.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.
            hashes: k, the rows of a sum.
            weighted: whether each row is multiplied by a scalar of the id.
            shared: one table for all id spaces, or one for each.
        """
        if hashes < 1:
            raise UserError(f"multihash: hashes must be at least 1; got {hashes}")
        row, scalars = spec.row_bytes(spec.dim), spec.row_bytes(hashes) if weighted else 0

        def sized(name: str, num_ids: int, target: int) -> list[Table]:
            """The tables for ids of one space, or of all: at most `target` bytes, or else the smallest."""
            if not weighted:
                return [spec.table(name, min(max(target // row, 1), MAX_ROWS), spec.dim)]
            num_scalars = max(min(target // 2 // scalars, (target - row) // scalars, num_ids, MAX_ROWS), 1)
            num_rows = min(max((target - num_scalars * scalars) // row, 1), MAX_ROWS)
            return [spec.table(name, num_rows, spec.dim), spec.table(f"{name}@scalars", num_scalars, hashes)]

        def encoded(space: Feature, tables: list[Table]) -> Encoding:
            parts = [tables[0]] * hashes + tables[1:]
            seeds = tuple(seed_of(space.name, k, spec.seed) for k in range(len(parts)))
            num_rows = tuple(table.num_rows for table in parts)
            return cls(spec.dim, None, tuple(table.name for table in parts), seeds, num_rows, weighted)

        def choose(space: Feature, target: int) -> Solution:
            tables = sized(space.name, space.num_ids, target)
            if not space.hashed and spec.dense_bytes(space) <= max(target, sum(table.nbytes for table in tables)):
                return dense_solution(space, spec)
            return Solution([encoded(space, tables)], tables)

        if not shared:
            return fill(spaces, budget, spec, cls.method, choose)
        found = shared_budget(spaces, budget, spec, cls.method, row + scalars)
        if isinstance(found, Solution):
            return found
        name = f"@{'weighted' if weighted else 'multihash'}{hashes}"
        tables = sized(name, sum(space.num_ids for space in spaces), found)
        return Solution([encoded(space, tables) for space in spaces], tables)
