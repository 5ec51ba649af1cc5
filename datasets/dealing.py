"""Who reads which rows of an epoch, as arithmetic on positions: no files, no processes.

    positions   0 1 2 3 | 4 5 6 7 | 8 9 ...        world_size 2, batch_size 2
    batch       0         1         2
    rank        0 0 1 1   0 0 1 1   0 1

A batch of all ranks together is a contiguous range of positions, and each rank has its piece of it. So W ranks with
batches of B rows see, step by step, what one process sees with batches of W * B, and what is left of an epoch is a few
ranges of rows, which any other number of processes can go on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]
"""Positions [start, stop)."""


@dataclass(frozen=True)
class Deal:
    """The rows [0, rows) of a stream, dealt batch after batch, each batch rank after rank.

    The last batch has equal pieces too, so fewer than `world_size` rows (fewer than a batch with `drop_last`) are left
    to nobody. Each worker of a rank's DataLoader has a contiguous range of batches, so that it decodes only those.

    Args:
        rows: of the stream.
        world_size: number of ranks.
        batch_size: rows per batch and rank.
        workers: of each rank, at least 1.
        drop_last: drop the last batch unless it is full.
    """

    rows: int
    world_size: int
    batch_size: int
    workers: int = 1
    drop_last: bool = False

    @property
    def rows_per_rank(self) -> int:
        """Rows that each rank reads."""
        each = self.rows // self.world_size
        return each - each % self.batch_size if self.drop_last else each

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-self.rows_per_rank // self.batch_size)

    def share(self, worker: int) -> Range:
        """The batches [low, high) of a worker. A DataLoader takes from its n workers in turn: batch i from i % n."""
        low = sum(_every(len(self), i, self.workers) for i in range(worker))
        return low, low + _every(len(self), worker, self.workers)

    def rest(self, worker: int, done: int) -> Range:
        """The batches of a worker's share that remain when `done` batches were taken from the loader."""
        low, high = self.share(worker)
        return low + _every(done, worker, self.workers), high

    def positions(self, low: int, high: int) -> Range:
        """The positions of the batches [low, high), of all ranks."""
        size, end = self.world_size * self.batch_size, self.world_size * self.rows_per_rank
        return min(low * size, end), min(high * size, end)

    def ranks(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rank of each of the positions [start, stop), which some rank reads; int64 [stop - start]."""
        size = self.world_size * self.batch_size
        last = self.rows_per_rank // self.batch_size * size  # where the last, smaller batch begins
        at = np.arange(start, stop)
        tail = max(self.rows_per_rank % self.batch_size, 1)
        return np.where(at < last, at % size // self.batch_size, (at - last) // tail)

    def rows_of(self, rank: int, parts: Iterable[tuple[int, int, int]], start: int, stop: int) -> NDArray[np.int64]:
        """A rank's rows among the positions [start, stop) of parts (from `within`) of an epoch's order, ascending."""
        found = [np.empty(0, np.int64)]
        for row, first, end in parts:
            low, high = max(first, start), min(end, stop)
            if low < high:
                found.append(np.flatnonzero(self.ranks(low, high) == rank) + row + low - first)
        return np.concatenate(found)

    def left(self, done: int) -> list[Range]:
        """The positions that no rank has read when `done` batches were taken from each rank's loader."""
        rests = [self.positions(*self.rest(worker, done)) for worker in range(self.workers)]
        nobodys = (self.world_size * self.rows_per_rank, self.rows)
        return _joined([*rests, nobodys])


def cut(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """The part [start, stop) of ranges that are laid end to end."""
    found, begin = [], 0
    for low, high in ranges:
        inner = max(low, low + start - begin), min(high, low + stop - begin)
        if inner[0] < inner[1]:
            found.append(inner)
        begin += high - low
    return found


def within(ranges: Sequence[Range], low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """What of the ranges lies in [low, high): where it starts, and its [start, stop) in the ranges laid end to end."""
    begin = 0
    for first, end in ranges:
        inner = max(first, low), min(end, high)
        if inner[0] < inner[1]:
            yield inner[0], begin + inner[0] - first, begin + inner[1] - first
        begin += end - first


def size(ranges: Sequence[Range]) -> int:
    """Positions in all of the ranges."""
    return sum(high - low for low, high in ranges)


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Without empty ranges, and neighbours as one."""
    found: list[Range] = []
    for low, high in ranges:
        if low >= high:
            continue
        if found and found[-1][1] == low:
            low = found.pop()[0]
        found.append((low, high))
    return found


def _every(count: int, first: int, step: int) -> int:
    """How many of range(count) are first, first + step, first + 2 step, ..."""
    return max(0, -(-(count - first) // step))
