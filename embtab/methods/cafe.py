"""CAFE: the ids that are hot now own a row each, all others share hashed rows; what is hot is found while training.

Zhang et al., "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models", SIGMOD 2024,
arXiv 2312.03256. One table of 4 B + R rows. The id in slot p of the hot map owns row p; slots lie in B buckets of four,
and an id may only lie in the bucket of its hash, so finding it is four comparisons:

    row(id) = p                       if slots[p] == id for one of the p of bucket hash(id, seeds[0])
              4 B + hash(id, seeds[1])  otherwise

A slot is its id (8 bytes, counted). An empty slot holds an id of another bucket, which nothing can match.

While training, `observe` counts ids in a count-min sketch (Cormode and Muthukrishnan, 2005) and keeps four candidates
for every bucket; `adapt` gives the slots of a bucket to the four highest counts and halves all counts, so that ids fade
("TinyLFU", Einziger et al., 2017). A promoted id's row starts as a copy of the shared row it had, so its vector does
not jump; the fused optimizer remembers nothing of it, so that it may soon leave the row that others shaped (on
synthetic drift better than a copy of what the optimizer remembers). A demoted id reads its shared row again.

Differs from the paper and its code (HugoZHL/CAFE):
- importance is frequency, which the paper offers beside the gradient's norm: backward is fused and shows no gradient;
- an id is promoted when its count exceeds that of a hot id of its bucket by half (so that ranks in noise do not
  change hands), not when it passes a tuned threshold; nothing is to be tuned per dataset;
- the sketch is needed in training alone: it is in checkpoints, but not among the serving bytes;
- exact on bags, for any int64, with no limit on the ids of a batch (the code takes one-hot batches of up to 16384).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS, expected_collisions, hash_rows, seed_of
from embtab.methods.base import Array, Encoding, LiveTable, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec

SLOTS = 4  # of a bucket
CELLS = 8  # of each row of the sketch, per slot


@dataclass(frozen=True)
class CAFE(Encoding):
    """The row of the slot that holds the id, else a hashed row; any int64 is an id.

    Args:
        seeds: of the bucket, of the shared row, and of the two rows of the sketch.
        num_buckets: B.
        num_rows: R, the shared rows.
        every: steps between reorganisations.
    """

    seeds: tuple[int, ...]
    num_buckets: int
    num_rows: int
    every: int

    method: ClassVar[str] = "cafe"
    bare: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def check(self) -> None:
        """Four seeds, two buckets at least (an empty slot holds an id of another), and steps that come."""
        require(len(self.seeds) == 4, f"{len(self.seeds)} seeds where there are 4")
        require(
            self.num_buckets >= 2 and self.num_rows >= 1, f"{self.num_buckets} buckets, {self.num_rows} shared rows"
        )
        require(self.every >= 1, f"every is {self.every}")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A row per slot, and the shared rows behind them."""
        return [(SLOTS * self.num_buckets + self.num_rows, self.dim)]

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Seeds and sizes of the two hashes."""
        return {
            "bucket_seed": (self.seeds[0],),
            "row_seed": (self.seeds[1],),
            "num_buckets": (self.num_buckets,),
            "num_rows": (self.num_rows,),
        }

    def arrays(self) -> dict[str, ArraySpec]:
        """The hot map; and for training the candidates [4 B] and the sketch [2, cells]."""
        hot = SLOTS * self.num_buckets
        return {
            "slots": ArraySpec((hot,), "int64", part="hot map"),
            "candidates": ArraySpec((hot,), "int64", serving=False),
            "sketch": ArraySpec((2, CELLS * hot), "int32", serving=False),
        }

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """Nothing is hot, nothing was counted."""
        if name == "sketch":
            return np.zeros((2, CELLS * SLOTS * self.num_buckets), np.int32)
        home = self._bucket(np.arange(1000))
        elsewhere = int(np.flatnonzero(home != home[0])[0])
        return np.repeat(np.where(np.arange(self.num_buckets) == home[0], elsewhere, 0), SLOTS)

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The shared row, unless one of the four slots of the id's bucket holds the id."""
        first = SLOTS * hash_rows(ids, c["bucket_seed"], c["num_buckets"])
        rows = SLOTS * c["num_buckets"] + hash_rows(ids, c["row_seed"], c["num_rows"])
        for slot in range(SLOTS):
            rows = rows + (first + slot - rows) * (c["slots"][first + slot] == ids)
        return rows

    def colliding(self, num_ids: int) -> float:
        """Ids of one shared row, once every slot is taken."""
        return expected_collisions(max(num_ids - SLOTS * self.num_buckets, 0), self.num_rows)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The row itself."""
        return parts[0]

    def start(self, std: float) -> Sequence[PartInit]:
        """As asked for: a vector is one row."""
        return [PartInit(0.0, std)]

    def observe(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> None:
        """Counts the ids; newcomers change places with candidates of their bucket, strongest against weakest."""
        for cells, places in zip(arrays["sketch"], self._places(ids, arrays), strict=True):
            cells.index_add_(0, places, torch.ones_like(places, dtype=cells.dtype))
        slots, candidates = (arrays[name].view(-1, SLOTS) for name in ("slots", "candidates"))
        ids = ids.unique()
        buckets = self._bucket(ids)
        known = ((slots[buckets] == ids.unsqueeze(1)) | (candidates[buckets] == ids.unsqueeze(1))).any(1)
        ids, buckets = ids[~known], buckets[~known]
        counts = self._counts(ids, arrays)
        order = (buckets << 32 | 2**31 - counts).sort(stable=True).indices
        ids, buckets, counts = ids[order], buckets[order], counts[order]
        rank = torch.arange(len(ids), device=ids.device) - torch.searchsorted(buckets, buckets)
        first = rank < SLOTS
        ids, buckets, counts, rank = ids[first], buckets[first], counts[first], rank[first].unsqueeze(1)
        weakest, at = self._scores(candidates[buckets], buckets, arrays).sort(dim=1, stable=True)
        better = counts > weakest.gather(1, rank).squeeze(1)
        candidates[buckets[better], at.gather(1, rank).squeeze(1)[better]] = ids[better]

    def due(self, step: int, epoch: int | None) -> bool:
        """Every so many steps."""
        return step % self.every == 0

    def adapt(
        self, tables: Mapping[str, LiveTable], arrays: Mapping[str, Tensor], generator: np.random.Generator
    ) -> None:
        """Lets candidates and hot ids of a bucket change places, strongest against weakest; halves the counts."""
        slots, candidates = (arrays[name].view(-1, SLOTS) for name in ("slots", "candidates"))
        buckets = torch.arange(self.num_buckets, device=slots.device)
        holding = self._scores(slots, buckets, arrays)
        weakest, at = (holding + (holding.clamp(min=0) >> 1)).sort(dim=1, stable=True)
        strongest, of = self._scores(candidates, buckets, arrays).sort(dim=1, stable=True, descending=True)
        bucket, rank = (strongest > weakest).nonzero().unbind(1)
        slot, candidate = at[bucket, rank], of[bucket, rank]
        promoted, demoted = candidates[bucket, candidate], slots[bucket, slot]
        shared = SLOTS * self.num_buckets + hash_rows(promoted, self.seeds[1], self.num_rows)
        live = tables[self.tables[0]]
        live.values[SLOTS * bucket + slot] = live.values[shared]
        if live.moments is not None:
            live.moments[SLOTS * bucket + slot] = 0
        slots[bucket, slot], candidates[bucket, candidate] = promoted, demoted
        arrays["sketch"].bitwise_right_shift_(1)

    def _bucket(self, ids: Array) -> Array:
        return hash_rows(ids, self.seeds[0], self.num_buckets)

    def _places(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        """The cell of each id in each row of the sketch."""
        return [hash_rows(ids, seed, arrays["sketch"].shape[1]) for seed in self.seeds[2:]]

    def _counts(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """int64, of the shape of the ids: how often each was seen of late, or more where it shares cells."""
        first, second = (row[at] for row, at in zip(arrays["sketch"], self._places(ids, arrays), strict=True))
        return torch.minimum(first, second).long()

    def _scores(self, held: Tensor, buckets: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The counts of the ids [N, 4] held in some buckets [N]; -1 where a place is empty."""
        return torch.where(self._bucket(held) == buckets.unsqueeze(1), self._counts(held, arrays), -1)

    @classmethod
    def solve(
        cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, hot: float = 0.7, every: int = 100
    ) -> Solution:
        """A share `hot` of the bytes for exclusive rows and their slots, the rest for shared rows."""
        if not 0 < hot < 1:
            raise UserError(f"cafe: hot is a share of the bytes, above 0 and below 1; got {hot}")
        if every < 1:
            raise UserError(f"cafe: every must be a positive number of steps; got {every}")
        row = spec.row_bytes(spec.dim)
        bucket = SLOTS * (row + 8)

        def choose(space: Feature, target: int) -> Solution:
            if spec.dense_bytes(space) <= max(target, 2 * bucket + row) and not space.hashed:
                return dense_solution(space, spec)
            buckets = min(max(min(int(hot * target), target - row) // bucket, 2), MAX_ROWS // (2 * SLOTS * CELLS))
            rows = min(max((target - buckets * bucket) // row, 1), MAX_ROWS - SLOTS * buckets)
            seeds = tuple(seed_of(space.name, k, spec.seed) for k in range(4))
            encoding = cls(spec.dim, None, (space.name,), seeds, buckets, rows, every)
            return Solution([encoding], [spec.table(space.name, SLOTS * buckets + rows, spec.dim)])

        return fill(spaces, budget, spec, cls.method, choose)
