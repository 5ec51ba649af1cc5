"""Prepared Parquet to batches: streaming, shuffled, shared out to ranks and workers, resumable.

One epoch has one global order of rows: row groups (permuted where shuffled) are taken a few at a time as *windows*,
and each window's rows are permuted. A rank reads a contiguous range of that order, and a DataLoader worker a contiguous
range of the rank's batches, so each decodes only what it needs, and a resumed epoch starts at its first row's window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embtab.datasets.parquet import RowGroup, read_columns, row_groups
from embtab.datasets.rows import Rows
from embtab.datasets.schema import Dataset
from embtab.errors import UserError

SHUFFLE_GROUPS = 4  # row groups whose rows are mixed: 262,144 rows, about 80 MB of Criteo


@dataclass
class Batch(Pipelineable):
    """B rows.

    Attributes:
        dense: float32 [B, number of dense columns].
        sparse: KeyedJaggedTensor with one key per feature, in dataset order; int64 values and lengths.
        label: float32 [B], 0 or 1.
        user: int64 [B], or None where the dataset names no user column.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    label: Tensor
    user: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(
            self.dense.to(device, non_blocking=non_blocking),
            self.sparse.to(torch.device(device), non_blocking=non_blocking),
            self.label.to(device, non_blocking=non_blocking),
            None if self.user is None else self.user.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU can overlap with work."""
        user = None if self.user is None else self.user.pin_memory()
        return Batch(self.dense.pin_memory(), self.sparse.pin_memory(), self.label.pin_memory(), user)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from being reused before `stream` is done with it."""
        for tensor in (self.dense, self.sparse, self.label, self.user):
            if tensor is not None:
                tensor.record_stream(stream)


class ParquetBatches(IterableDataset[Batch]):
    """The batches of one split of a prepared dataset; give it to a `DataLoader(..., batch_size=None)` or iterate it.

    The stream is a pure function of (files, split, batch_size, shuffle, seed, epoch, rank, world_size). DataLoader
    workers change only the order of its batches, and that reproducibly.

    Args:
        folder: a folder made by `embtab prepare`.
        split: "train", "valid" or "test".
        batch_size: rows per batch and rank.
        shuffle: permute row groups, and rows within windows of several row groups, anew each epoch.
        seed: of the shuffle.
        drop_last: drop the last batch of each rank unless it is full.
        prefetch: windows decoded ahead by a thread; 0 decodes in the caller's thread.
        rank: of this process; by default from torch.distributed where it is initialised, else 0.
        world_size: number of processes; default as for `rank`. Every rank yields equally many batches of equal sizes.

    Attributes:
        rows: rows of the split.
        rows_dropped: rows no rank yields in an epoch: fewer than `world_size`, or more with `drop_last`.

    Raises:
        UserError: for an unknown split or numbers that leave no batch.
        DataError: when files are absent, unreadable or other than described; while iterating, when a row group cannot
            be decoded or holds a null.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.world_size = _place(rank, world_size)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if prefetch < 0:
            raise UserError(f"prefetch must be 0 or more, got {prefetch}")
        self.folder, self.split = Path(folder), split
        self.batch_size, self.shuffle, self.seed, self.prefetch = batch_size, shuffle, seed, prefetch
        self.dataset = Dataset.load(folder)
        self._groups = row_groups(self.folder, self.dataset, split)
        self.rows = sum(group.rows for group in self._groups)
        self.rows_per_rank = self.rows // self.world_size
        if drop_last:
            self.rows_per_rank -= self.rows_per_rank % batch_size
        if self.rows_per_rank == 0:
            raise UserError(
                f"{folder}: the {split} split has {self.rows} rows, too few for a batch of {batch_size} on each of "
                f"{self.world_size} ranks; use a smaller batch_size or fewer ranks"
            )
        self.rows_dropped = self.rows - self.rows_per_rank * self.world_size
        self.epoch = 0
        self._position = 0
        self._resume_at = 0

    def __len__(self) -> int:
        """Batches that each rank yields in an epoch."""
        return -(-self.rows_per_rank // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of the next iteration; call it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, the same on every rank; `batch` counts the batches yielded in this epoch.

        With DataLoader workers the iteration happens in their copies: put the number of batches taken from the loader
        into `batch` yourself.
        """
        return {"epoch": self.epoch, "batch": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue after `state["batch"]` batches of epoch `state["epoch"]`.

        Raises:
            UserError: when the state belongs to another stream.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(f"cannot resume the data stream: {name} was {state.get(name)!r} and is now {value!r}")
        self.epoch = state["epoch"]
        self._position = self._resume_at = state["batch"]

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.dataset.fingerprint,
            "split": self.split,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def __iter__(self) -> Iterator[Batch]:
        start, self._resume_at = self._resume_at, 0
        self._position = start
        low, high = self._share(start)
        first_row = self.rank * self.rows_per_rank
        stop = first_row + min(high * self.batch_size, self.rows_per_rank)
        for batch in self._batches(first_row + low * self.batch_size, stop):
            self._position += 1  # before the consumer sees it: a state taken while it holds batch n says n + 1
            yield batch

    def _share(self, start: int) -> tuple[int, int]:
        """The range of this worker's batches when `start` batches of the rank are already done.

        A DataLoader takes from its n workers in turn, beginning with the first: batch i comes from share i % n. So when
        it begins anew at batch `start`, its first worker goes on with share `start % n`.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = (worker + start) % workers
        counts = [_every(len(self), i, workers) for i in range(workers)]
        before = sum(counts[:share])
        return before + _every(start, share, workers), before + counts[share]

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the rows [start, stop) of the epoch's global order."""
        pieces: list[tuple[Rows, int, int]] = []
        held = 0
        for rows, low, high in self._windows(start, stop):
            while low < high:
                taken = min(high - low, self.batch_size - held)
                pieces.append((rows, low, low + taken))
                low, held = low + taken, held + taken
                if held == self.batch_size:
                    yield self._assemble(pieces)
                    pieces, held = [], 0
        if pieces:
            yield self._assemble(pieces)

    def _windows(self, start: int, stop: int) -> Iterator[tuple[Rows, int, int]]:
        """The windows that overlap rows [start, stop) of the global order, each with the range of its rows to take."""
        order = np.arange(len(self._groups))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        size = SHUFFLE_GROUPS if self.shuffle else 1
        windows = [[self._groups[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
        ends = list(accumulate(sum(group.rows for group in window) for window in windows))
        begins = [0, *ends[:-1]]
        wanted = [i for i in range(len(windows)) if begins[i] < stop and ends[i] > start]
        decoded = _ahead((lambda i=i: self._decode(windows[i], i) for i in wanted), self.prefetch)
        for i, rows in zip(wanted, decoded, strict=True):
            yield rows, max(start - begins[i], 0), min(stop, ends[i]) - begins[i]

    def _decode(self, window: list[RowGroup], index: int) -> Rows:
        columns = [name for name in self.dataset.arrow_schema().names if name not in self.dataset.unread]
        tables = [read_columns(group, columns) for group in window]
        order = None
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            order = rng.permutation(sum(len(table) for table in tables))
        return Rows.of(tables, self.dataset, order)

    def _assemble(self, pieces: list[tuple[Rows, int, int]]) -> Batch:
        values, lengths, length_per_key = [], [], []
        for feature in range(len(self.dataset.features)):
            cut = [rows.features[feature].cut(low, high) for rows, low, high in pieces]
            values += [bag_values for bag_values, _ in cut]
            lengths += [bag_lengths for _, bag_lengths in cut]
            length_per_key.append(sum(len(bag_values) for bag_values, _ in cut))
        label = torch.cat([rows.label[low:high] for rows, low, high in pieces])
        sparse = KeyedJaggedTensor(
            [feature.name for feature in self.dataset.features],
            torch.cat(values) if values else torch.empty(0, dtype=torch.int64),
            lengths=torch.cat(lengths) if lengths else torch.empty(0, dtype=torch.int64),
            stride=len(label),
            length_per_key=length_per_key,
            offset_per_key=[0, *accumulate(length_per_key)],
        )
        dense = torch.cat([rows.dense[low:high] for rows, low, high in pieces])
        users = [rows.user[low:high] for rows, low, high in pieces if rows.user is not None]
        return Batch(dense, sparse, label, torch.cat(users) if users else None)


def _ahead(calls: Iterable[Any], depth: int) -> Iterator[Any]:
    """The results of the calls in order, `depth` of them computed ahead by one thread; errors surface in their turn."""
    if depth == 0:
        yield from (call() for call in calls)
        return
    pending: deque[Future] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="embtab-reader")
    try:
        for call in calls:
            pending.append(thread.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _every(count: int, first: int, step: int) -> int:
    """How many of range(count) are first, first + step, first + 2 step, ..."""
    return max(0, -(-(count - first) // step))


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if distributed else 1
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    if not 0 <= rank < world_size:
        raise UserError(f"rank must lie in [0, {world_size}), got {rank}")
    return rank, world_size
