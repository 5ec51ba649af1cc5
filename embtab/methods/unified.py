"""Unified embedding (feature multiplexing): all id spaces share one table, read in several chunks.

Coleman et al., "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems", NeurIPS 2023,
arXiv 2305.12102. A vector is the concatenation of `chunks` rows of width D / chunks, each found by a hash of its own.

Differs from the reference layer (TensorFlow Recommenders): hash seeds come from the feature's name, not from its
position, so that adding or reordering features moves no row; chunks keep their numeric order beyond ten; and all chunks
read one table (the paper's own analysis is of one table), so that its size is free of divisibility by tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require, require_hashable
from embtab.methods.dense import shared_budget


@dataclass(frozen=True)
class Unified(Encoding):
    """`len(seeds)` hashed rows of the shared table, side by side; any int64 is an id."""

    seeds: tuple[int, ...]
    num_rows: int

    method: ClassVar[str] = "unified"
    arithmetic: ClassVar[str | None] = "hash"

    @property
    def joining(self) -> str:
        """Side by side."""
        return "concat"

    def check(self) -> None:
        """Chunks divide the vector."""
        require_hashable(self.num_rows)
        require(self.seeds and self.dim % len(self.seeds) == 0, f"{len(self.seeds)} seeds do not divide {self.dim}")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """One table for all chunks."""
        return [(self.num_rows, self.dim // len(self.seeds))] * len(self.seeds)

    def constants(self) -> dict[str, tuple[int, ...]]:
        """A seed per chunk and the number of rows."""
        return {"seed": self.seeds, "num_rows": (self.num_rows,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """One independent hash per chunk."""
        return hash_rows(ids, c["seed"], c["num_rows"])

    def colliding(self, num_ids: int) -> float:
        """Ids that share the rows of all chunks."""
        return expected_collisions(num_ids, self.num_rows ** len(self.seeds))

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The chunks side by side, in order."""
        return torch.cat(tuple(parts), dim=-1)

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: every entry of a vector is one entry of a row."""
        return [PartInit(0.0, std)] * len(self.tables)

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, chunks: int = 2) -> Solution:
        """As many shared rows as fit; when the dense tables fit, they are better and are taken."""
        if chunks < 1 or spec.dim % chunks:
            raise UserError(f"unified: chunks must divide dim; got chunks={chunks}, dim={spec.dim}")
        width = spec.dim // chunks
        found = shared_budget(spaces, budget, spec, cls.method, spec.row_bytes(width))
        if isinstance(found, Solution):
            return found
        num_rows = min(found // spec.row_bytes(width), MAX_ROWS)
        name = f"@unified{width}"
        encodings: list[Encoding] = []
        for space in spaces:
            seeds = tuple(seed_of(space.name, k, spec.seed) for k in range(chunks))
            encodings.append(cls(spec.dim, None, (name,) * chunks, seeds, num_rows))
        return Solution(encodings, [spec.table(name, num_rows, width)])
