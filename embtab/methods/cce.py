"""Clustered compositional embeddings: hashed rows beside rows that k-means, run while training, deals out anew.

Tsang and Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023, arXiv 2210.05974.
A vector is the concatenation over chunks j of

    T0[j, h0[id, j]] + T1[j, hash(id, seeds[j])]

T0 is read through a learnt pointer h0 (random at first), T1 through a hash. `adapt` clusters, chunk by chunk, the sums
of all ids: T0 becomes the centroids, h0 the assignments, the hash gets a new seed, and T1 the mean of what the
centroids leave over for the ids that now share a row. Similar ids share a row of T0 from then on, and ids that
collided by chance in T1 are parted.

Differs from the paper and its code (thomasahle/cce):
- The pointers count: `chunks` bytes per id (2 * chunks for more than 256 centroids), which the paper leaves out. So
  T0 has at most `centroids` rows per chunk, and T1 the rest of the budget; both are equal where the budget is small.
- h1 is a seeded hash, which takes 8 bytes a chunk where the code keeps an int64 buffer [ids, chunks]. The code draws h1
  again within the loop that assigns ids batch by batch, so that batches disagree; here it changes once per clustering.
- What the fused optimizer remembers of a row means nothing after clustering: every row of a table gets the table's
  mean, so that step sizes stay what they were on average (the code leaves it stale).
- Clusterings run after each of the first `clusterings` epochs, or after `every` steps each (for training in one epoch),
  and only if training goes on; the code clusters after each epoch until 75 % of the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows
from embtab.methods.base import Array, Encoding, LiveTable, PartInit, Solution, Spec, require, require_hashable
from embtab.methods.dense import dense_solution
from embtab.methods.kmeans import group_means, kmeans, nearest
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec


@dataclass(frozen=True)
class CCE(Encoding):
    """`chunks` sums of a pointed-to row and a hashed row; parts 0..chunks-1 are T0's, the others T1's.

    Args:
        chunks: C.
        centroids: rows of T0 for each chunk.
        num_rows: rows of T1 for each chunk.
        pointer: the integer type of h0.
        every: steps between clusterings; 0 for the start of every epoch.
        clusterings: how often to cluster.
    """

    chunks: int
    centroids: int
    num_rows: int
    pointer: str
    every: int
    clusterings: int

    method: ClassVar[str] = "cce"
    adaptive: ClassVar[bool] = True

    def check(self) -> None:
        """Chunks divide the vector, and pointers reach every centroid."""
        require_hashable(self.num_rows)
        require(self.chunks >= 1 and self.dim % self.chunks == 0, f"{self.chunks} chunks do not divide {self.dim}")
        most = {"uint8": 2**8, "int16": 2**15}.get(self.pointer, 0)
        require(1 <= self.centroids <= most, f"pointers of {self.pointer!r} to {self.centroids} centroids")
        pointed, hashed = self.tables[: self.chunks], self.tables[self.chunks :]
        require(len({*pointed}) == 1 == len({*hashed}), "chunks read more than two tables")
        require(self.bounded_ids >= 1, f"num_ids is {self.num_ids}")
        require(self.every >= 0 and self.clusterings >= 0, f"every is {self.every}, clusterings is {self.clusterings}")

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Pointers are those of centroids."""
        pointers = arrays["pointers"]
        require(pointers.min() >= 0 and pointers.max() < self.centroids, f"a pointer beyond {self.centroids} centroids")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """The centroids of every chunk, and the hashed rows of every chunk."""
        width = self.dim // self.chunks
        pointed, hashed = (self.chunks * self.centroids, width), (self.chunks * self.num_rows, width)
        return [pointed] * self.chunks + [hashed] * self.chunks

    def constants(self) -> dict[str, tuple[int, ...]]:
        """For each part: its chunk, whether it is hashed, and the first row of its chunk; and T1's rows."""
        chunk = tuple(range(self.chunks))
        return {
            "chunk": chunk * 2,
            "hashed": (0,) * self.chunks + (1,) * self.chunks,
            "first": tuple(j * self.centroids for j in chunk) + tuple(j * self.num_rows for j in chunk),
            "num_rows": (self.num_rows,),
        }

    def arrays(self) -> dict[str, ArraySpec]:
        """h0 and the seeds of h1, which change and so are no constants."""
        return {
            "pointers": ArraySpec((self.bounded_ids, self.chunks), self.pointer, part="pointers"),
            "seeds": ArraySpec((self.chunks,), "int64", part="seeds"),
        }

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """Random pointers, random seeds."""
        if name == "seeds":
            return _seeds(generator, self.chunks)
        shape = self.arrays()[name].shape
        return generator.integers(0, self.centroids, shape, np.int32).astype(self.pointer)

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The pointer for the first half of the parts, the hash for the second."""
        pointed = c["pointers"][ids, c["chunk"]]
        hashed = hash_rows(ids, c["seeds"][c["chunk"]], c["num_rows"])
        return c["first"] + pointed + (hashed - pointed) * c["hashed"]

    def colliding(self, num_ids: int) -> float:
        """Ids whose pointers and hashes all agree; clusters do not change their number."""
        return expected_collisions(num_ids, (self.centroids * self.num_rows) ** self.chunks)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The sums of the chunks, side by side."""
        return torch.cat([parts[j] + parts[self.chunks + j] for j in range(self.chunks)], dim=-1)

    def start(self, std: float) -> Sequence[PartInit]:
        """The variances of the two terms add."""
        return [PartInit(0.0, std / math.sqrt(2))] * len(self.tables)

    def due(self, step: int, epoch: int | None) -> bool:
        """At the start of an epoch, or every so many steps, as long as clusterings are left."""
        if self.every:
            return step % self.every == 0 and step // self.every <= self.clusterings
        return epoch is not None and 0 < epoch <= self.clusterings

    def adapt(
        self, tables: Mapping[str, LiveTable], arrays: Mapping[str, Tensor], generator: np.random.Generator
    ) -> None:
        """Clusters the sums of every chunk."""
        pointed, hashed = tables[self.tables[0]], tables[self.tables[-1]]
        pointers, seeds = arrays["pointers"], arrays["seeds"]
        fresh = torch.from_numpy(_seeds(generator, self.chunks)).to(seeds.device)
        ids = torch.arange(len(pointers), device=pointers.device)
        each = zip(pointed.values.split(self.centroids), hashed.values.split(self.num_rows), strict=True)
        for j, (t0, t1) in enumerate(each):
            sums = t0[pointers[:, j].long()] + t1[hash_rows(ids, seeds[j], self.num_rows)]
            centroids = kmeans(sums, self.centroids, generator)
            assigned = nearest(sums, centroids)
            left_over, _ = group_means(
                sums - centroids[assigned], hash_rows(ids, fresh[j], self.num_rows), self.num_rows
            )
            t0.copy_(centroids)
            t1.copy_(left_over)
            pointers[:, j] = assigned.to(pointers.dtype)
        seeds.copy_(fresh)
        for moments in (pointed.moments, hashed.moments):
            if moments is not None:
                moments.copy_(moments.mean(0, keepdim=True).expand_as(moments))

    @classmethod
    def solve(
        cls,
        spaces: Sequence[Feature],
        budget: int | None,
        spec: Spec,
        *,
        chunks: int = 4,
        centroids: int = 256,
        every: int = 0,
        clusterings: int = 4,
    ) -> Solution:
        """As many rows as fit beside the pointers, half of them T0's up to `centroids` per chunk."""
        if chunks < 1 or spec.dim % chunks:
            raise UserError(f"cce: chunks must divide dim; got chunks={chunks}, dim={spec.dim}")
        if not 1 <= centroids <= 2**15:
            raise UserError(f"cce: centroids must lie in [1, 32768]; got {centroids}")
        if every < 0 or clusterings < 0:
            raise UserError(f"cce: every and clusterings must not be negative; got {every} and {clusterings}")
        pointer = "uint8" if centroids <= 256 else "int16"
        width = spec.dim // chunks
        row_bytes = chunks * spec.row_bytes(width)

        def choose(space: Feature, target: int) -> Solution:
            def sized(rows: int) -> Solution:
                pointed = min(rows // 2, centroids)
                names = (f"{space.name}@pointed",) * chunks + (f"{space.name}@hashed",) * chunks
                settings = (chunks, pointed, rows - pointed, pointer, every, clusterings)
                tables = [
                    spec.table(names[0], chunks * pointed, width),
                    spec.table(names[-1], chunks * (rows - pointed), width),
                ]
                return Solution([cls(spec.dim, space.num_ids, names, *settings)], tables)

            least = sized(2)
            rows = 2 + min(max(target - least.nbytes, 0) // row_bytes, MAX_ROWS // chunks - 2)
            if target >= spec.dense_bytes(space) or least.nbytes >= spec.dense_bytes(space):
                return dense_solution(space, spec)
            return sized(rows)

        return fill(spaces, budget, spec, cls.method, choose)


def _seeds(generator: np.random.Generator, chunks: int) -> np.ndarray:
    """int64 [chunks], any of the 2^64."""
    return generator.integers(-(2**63), 2**63 - 1, chunks, dtype=np.int64, endpoint=True)
