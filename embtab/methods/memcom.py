"""MEmCom: a hashed row times a scalar of the id's own.

Pansare et al., "Learning Compressed Embeddings for On-Device Inference", MLSys 2022, arXiv 2203.10135:

    e(x) = U[h(x)] * V[x]        U: rows x D, shared by hashing; V: num_ids x 1, unique

Ids that share a row of U have vectors on one line, told apart by their scalars; V = 1 is the hashing trick, and where
V starts. V takes a number per id, so the method cannot go below 1 / D of the dense bytes. Products are formed per id,
before bags are pooled. The paper's variant with a bias per id doubles what V takes and is left out.

Differs from the paper: U is found by a seeded hash instead of `id % rows`. Where rows are quantised, V stays float32
if that takes fewer bytes (a row of one number would need a scale and an offset of its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from embtab.features import Feature
from embtab.hashing import MAX_ROWS, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require_hashable
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import Table


@dataclass(frozen=True)
class MEmCom(Encoding):
    """A hashed row of one table times row `id` of a table of width 1."""

    seed: int
    num_rows: int

    method: ClassVar[str] = "memcom"

    @property
    def linear(self) -> bool:
        """A product of sums is not the sum of products."""
        return False

    def check(self) -> None:
        """Ids can be hashed to so many rows."""
        require_hashable(self.num_rows)

    def shapes(self) -> Sequence[tuple[int, int]]:
        """Rows that ids are hashed to, and a scalar per id."""
        return [(self.num_rows, self.dim), (self.bounded_ids, 1)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The seed, the number of rows, and which part is hashed."""
        return {"seed": (self.seed,), "num_rows": (self.num_rows,), "hashed": (1, 0)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The seeded hash of the id, and the id."""
        return ids + c["hashed"] * (hash_rows(ids, c["seed"], c["num_rows"]) - ids)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row times the scalar."""
        row, scalar = parts
        return row * scalar

    def start(self, std: float) -> Sequence[PartInit]:
        """Rows as asked for; scalars are 1."""
        return [PartInit(0.0, std), PartInit(1.0, 0.0)]

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """Scalars for every id, then as many rows as fit; spaces that would not shrink stay dense."""

        def choose(space: Feature, target: int) -> Solution:
            name = f"{space.name}@scalars"
            scalars = min(spec.table(name, space.num_ids, 1), Table(name, space.num_ids, 1), key=lambda t: t.nbytes)
            num_rows = min(max((target - scalars.nbytes) // spec.row_bytes(spec.dim), 1), MAX_ROWS)
            rows = spec.table(f"{space.name}@rows", num_rows, spec.dim)
            if spec.dense_bytes(space) <= max(target, rows.nbytes + scalars.nbytes):
                return dense_solution(space, spec)
            seed = seed_of(space.name, 0, spec.seed)
            encoding = cls(spec.dim, space.num_ids, (rows.name, scalars.name), seed, num_rows)
            return Solution([encoding], [rows, scalars])

        return fill(spaces, budget, spec, cls.method, choose)
