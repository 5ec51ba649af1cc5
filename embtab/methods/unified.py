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
from embtab.hashing import MAX_ROWS, hash_rows, seed_of
from embtab.methods.base import FLOAT_BYTES, Array, Encoding, Solution, Table, infeasible
from embtab.methods.dense import Dense


@dataclass(frozen=True)
class Unified(Encoding):
    """`len(seeds)` hashed rows of the shared table, side by side; any int64 is an id."""

    seeds: tuple[int, ...]
    num_rows: int

    method: ClassVar[str] = "unified"

    def constants(self) -> dict[str, tuple[int, ...]]:
        """A seed per chunk and the number of rows."""
        return {"seed": self.seeds, "num_rows": (self.num_rows,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """One independent hash per chunk."""
        return hash_rows(ids, c["seed"], c["num_rows"])

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The chunks side by side, in order."""
        return torch.cat(tuple(parts), dim=-1)

    def part_std(self, std: float) -> float:
        """The dense table's own: every entry of a vector is one entry of a row."""
        return std

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, dim: int, seed: int, *, chunks: int = 2) -> Solution:
        """As many shared rows as fit; when the dense tables fit, they are better and are taken."""
        if chunks < 1 or dim % chunks:
            raise UserError(f"unified: chunks must divide dim; got chunks={chunks}, dim={dim}")
        dense = Dense.solve(spaces, None, dim, seed)
        if budget is None or dense.nbytes <= budget:
            return dense
        width = dim // chunks
        num_rows = min(budget // (width * FLOAT_BYTES), MAX_ROWS)
        if num_rows < 1:
            raise infeasible(cls.method, budget, width * FLOAT_BYTES)
        name = f"@unified{width}"
        encodings: list[Encoding] = [
            cls(dim, None, (name,) * chunks, tuple(seed_of(space.name, k, seed) for k in range(chunks)), num_rows)
            for space in spaces
        ]
        return Solution(encodings, [Table(name, num_rows, width)])
