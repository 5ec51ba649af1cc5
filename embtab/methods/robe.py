"""ROBE: one array of numbers for all id spaces, read in chunks that start anywhere and overlap.

Desai et al., "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM Model", MLSys 2022, arXiv
2108.02191. A vector is D / Z chunks of Z numbers; chunk c of id x in space t is

    array[s : s + Z],   s = hash(t, c, x) in [0, M - Z]        M numbers of the array   Z = `chunk`

Physical tables are matrices, so the array is held as M / g rows of g numbers, g = `granule`, and a chunk is Z / g
consecutive rows from a hashed first one, in [0, M / g - Z / g]. Chunks thus start at multiples of g and overlap in
whole granules. g = 1 is the paper's exact form; 4, the default, is what the fused kernel needs and costs a quarter of
its reads (g = Z would be a unified table without overlap).

Differs from the reference code (apd10/universal_memory_allocation): hash seeds come from the space's name instead of
the offset of its ids among all others, so adding a feature moves nothing, and ids may be any int64 (there id + offset
must stay below 2^31 and the array below 2,038,074,743 numbers). The optional sign hash is left out.
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
from embtab.methods.dense import shared_budget


@dataclass(frozen=True)
class Robe(Encoding):
    """Chunks of `window` consecutive rows of the shared table, one chunk per seed, side by side; any int64 is an id."""

    seeds: tuple[int, ...]
    window: int
    num_rows: int

    method: ClassVar[str] = "robe"

    @property
    def joining(self) -> str:
        """Side by side."""
        return "concat"

    def check(self) -> None:
        """Chunks fit into the array, and make a vector."""
        require_hashable(self.num_rows)
        require(1 <= self.window <= self.num_rows, f"a window of {self.window} in {self.num_rows} rows")
        parts = self.window * len(self.seeds)
        require(
            parts == len(self.tables), f"{len(self.seeds)} windows of {self.window} are not {len(self.tables)} parts"
        )
        require(len({*self.tables}) == 1, "parts read more than one array")
        require(parts and self.dim % parts == 0, f"{parts} parts do not divide {self.dim}")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """One array for all parts."""
        return [(self.num_rows, self.dim // len(self.tables))] * len(self.tables)

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Per part its chunk's seed and its place in the chunk; and how many rows a chunk may start at."""
        return {
            "seed": tuple(seed for seed in self.seeds for _ in range(self.window)),
            "place": tuple(range(self.window)) * len(self.seeds),
            "starts": (self.num_rows - self.window + 1,),
        }

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The hashed first row of the part's chunk, and on by the part's place."""
        return hash_rows(ids, c["seed"], c["starts"]) + c["place"]

    def colliding(self, num_ids: int) -> float:
        """Ids whose chunks all start at the same rows."""
        return expected_collisions(num_ids, (self.num_rows - self.window + 1) ** len(self.seeds))

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The rows side by side, in order."""
        return torch.cat(tuple(parts), dim=-1)

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: every entry of a vector is one entry of the array."""
        return [PartInit(0.0, std)] * len(self.tables)

    @classmethod
    def solve(
        cls,
        spaces: Sequence[Feature],
        budget: int | None,
        spec: Spec,
        *,
        chunk: int | None = None,
        granule: int | None = None,
    ) -> Solution:
        """The longest array that fits; when the dense tables fit, they are better and are taken.

        Args:
            spaces: the id spaces.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.
            chunk: Z, a divisor of dim; by default the greatest common divisor of dim and 8.
            granule: g, a divisor of chunk; by default the greatest common divisor of chunk and 4.
        """
        chunk = math.gcd(spec.dim, 8) if chunk is None else chunk
        if chunk < 1 or spec.dim % chunk:
            raise UserError(f"robe: chunk must divide dim; got chunk={chunk}, dim={spec.dim}")
        granule = math.gcd(chunk, 4) if granule is None else granule
        if granule < 1 or chunk % granule:
            raise UserError(f"robe: granule must divide chunk; got granule={granule}, chunk={chunk}")
        window = chunk // granule
        found = shared_budget(spaces, budget, spec, cls.method, window * spec.row_bytes(granule))
        if isinstance(found, Solution):
            return found
        num_rows = min(found // spec.row_bytes(granule), MAX_ROWS)
        name = f"@robe{chunk}by{granule}"
        encodings: list[Encoding] = []
        for space in spaces:
            seeds = tuple(seed_of(space.name, k, spec.seed) for k in range(spec.dim // chunk))
            encodings.append(cls(spec.dim, None, (name,) * (spec.dim // granule), seeds, window, num_rows))
        return Solution(encodings, [spec.table(name, num_rows, granule)])
