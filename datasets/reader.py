"""Prepared Parquet to batches: streaming, shuffled, shared out to ranks and workers, resumable.

One epoch has one global order of rows, whoever reads it: row groups (permuted where shuffled) are taken a few at a time
as *windows*, and each window's rows are permuted. Each batch of all ranks together is the next range of that order, and
each rank has its piece of it (see `dealing`), so N ranks see what one process with N times the batch size sees. A
rank decodes the windows that hold rows of it, and keeps these: all of an epoch's while a batch of all ranks is shorter
than a window, else one or two for each of its batches. DataLoader workers share a rank's windows.
What is left of an epoch is ranges of that order: any number of ranks, workers and rows a batch can go on with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embtab.datasets.ahead import ahead
from embtab.datasets.dealing import Deal, Range, cut, size, within
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
        row: int64 [B], the rows' numbers in their split, counted from 0 in file order; None of a shuffled stream.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    label: Tensor
    user: Tensor | None = None
    row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(
            self.dense.to(device, non_blocking=non_blocking),
            self.sparse.to(torch.device(device), non_blocking=non_blocking),
            self.label.to(device, non_blocking=non_blocking),
            None if self.user is None else self.user.to(device, non_blocking=non_blocking),
            None if self.row is None else self.row.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU can overlap with work."""
        user = None if self.user is None else self.user.pin_memory()
        row = None if self.row is None else self.row.pin_memory()
        return Batch(self.dense.pin_memory(), self.sparse.pin_memory(), self.label.pin_memory(), user, row)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from being reused before `stream` is done with it."""
        for tensor in (self.dense, self.sparse, self.label, self.user, self.row):
            if tensor is not None:
                tensor.record_stream(stream)


class ParquetBatches(IterableDataset[Batch]):
    """The batches of one split of a prepared dataset; give it to a `DataLoader(..., batch_size=None)` or iterate it.

    The stream is a pure function of (files, split, batch_size, shuffle, seed, epoch, rank, world_size); DataLoader
    workers change the order of its batches.

    Args:
        folder: a folder made by `embtab prepare`.
        split: "train", "valid" or "test".
        batch_size: rows per batch and rank.
        shuffle: permute row groups, and rows within windows of several row groups, anew each epoch.
        seed: of the shuffle.
        drop_last: drop the last batch of each rank unless it is full.
        every_row: repeat the last row until the ranks' shares are equal, instead of leaving out the rows that are too
            few for a further one on each rank; `Batch.row` tells the repetitions.
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
        every_row: bool = False,
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
        self.folder, self.split, self.drop_last = Path(folder), split, drop_last
        self.batch_size, self.shuffle, self.seed, self.prefetch = batch_size, shuffle, seed, prefetch
        self.dataset = Dataset.load(folder)
        self._groups = row_groups(self.folder, self.dataset, split)
        self.rows = sum(group.rows for group in self._groups)
        self._padding = -self.rows % self.world_size if every_row else 0
        whole = Deal(self.rows + self._padding, self.world_size, batch_size, drop_last=drop_last)
        if len(whole) == 0:
            raise UserError(
                f"{folder}: the {split} split has {self.rows} rows, too few for a batch of {batch_size} on each of "
                f"{self.world_size} ranks; use a smaller batch_size or fewer ranks"
            )
        self.rows_dropped = self.rows + self._padding - whole.rows_per_rank * self.world_size
        self._batches_per_epoch = len(whole)
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        """Makes the next iteration a whole epoch."""
        self.epoch, self._position, self._resumed = epoch, 0, False
        self._ranges: list[Range] = [(0, self.rows), *[(self.rows - 1, self.rows)] * self._padding]

    def __len__(self) -> int:
        """Batches that each rank yields in an epoch."""
        return self._batches_per_epoch

    def batches_left(self) -> int:
        """Batches that each rank still yields of the epoch that `load_state_dict` set."""
        return len(self._deal()) - self._position

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of the next iteration; call it before each epoch."""
        if epoch != self.epoch:
            self._begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, the same on every rank, as plain types.

        `batch` counts the batches yielded since `ranges` were all that was left of the epoch. With DataLoader workers
        the iteration happens in their copies: put the number of batches taken from the loader into `batch`, and that of
        its workers into `workers`, yourself.
        """
        return {
            "epoch": self.epoch,
            "ranges": [list(each) for each in self._ranges],
            "batch": self._position,
            "workers": 1,
            **self._dealing(),
            **self._identity(),
        }

    def start(self, epoch: int) -> dict[str, Any]:
        """What the state of an epoch's beginning says beside what identifies the stream."""
        return {"epoch": epoch, "ranges": [[0, self.rows]], "batch": 0}

    def load_state_dict(self, state: dict[str, Any], workers: int = 1) -> None:
        """Makes the next iteration continue there: as the same stream where it is dealt to the same number of ranks and
        workers in batches of the same size, else with the rows that no rank has read yet, each once.

        Args:
            state: from `state_dict`, of any rank.
            workers: of the DataLoader, at least 1.

        Raises:
            UserError: when the state belongs to another order of rows.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(f"cannot resume the data stream: {name} was {state.get(name)!r} and is now {value!r}")
        if "ranges" not in state:
            raise UserError("cannot resume the data stream: an older embtab wrote its state; begin with an epoch")
        self.epoch, self._resumed = state["epoch"], True
        self._ranges, self._position = [(low, high) for low, high in state["ranges"]], state["batch"]
        now = {**self._dealing(), "workers": workers}
        before = {name: state[name] for name in now}
        if before != now:
            left = Deal(size(self._ranges), **before).left(self._position)
            self._ranges = [each for low, high in left for each in cut(self._ranges, low, high)]
            self._position = 0

    def _identity(self) -> dict[str, Any]:
        """What fixes the order of an epoch's rows."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "split": self.split,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _dealing(self) -> dict[str, Any]:
        """What fixes who reads them."""
        return {"world_size": self.world_size, "batch_size": self.batch_size, "drop_last": self.drop_last}

    def _deal(self, workers: int = 1) -> Deal:
        return Deal(size(self._ranges), workers=workers, **self._dealing())

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._begin(self.epoch)
        self._resumed = False
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        deal, start = self._deal(workers), self._position
        # A DataLoader begins with its first worker, which so goes on with the share whose turn it is.
        low, high = deal.rest((worker + start) % workers, start)
        for batch in self._batches(deal, *deal.positions(low, high)):
            self._position += 1  # before the consumer sees it: a state taken while it holds batch n says n + 1
            yield batch

    def _batches(self, deal: Deal, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of the positions [start, stop) of what is left of the epoch."""
        pieces: list[tuple[Rows, int, int]] = []
        held = 0
        for rows in self._windows(deal, start, stop):
            low, high = 0, len(rows.label)
            while low < high:
                taken = min(high - low, self.batch_size - held)
                pieces.append((rows, low, low + taken))
                low, held = low + taken, held + taken
                if held == self.batch_size:
                    yield self._assemble(pieces)
                    pieces, held = [], 0
        if pieces:
            yield self._assemble(pieces)

    def _windows(self, deal: Deal, start: int, stop: int) -> Iterator[Rows]:
        """This rank's rows of these positions, window by window."""
        order = np.arange(len(self._groups))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        many = SHUFFLE_GROUPS if self.shuffle else 1
        windows = [[self._groups[i] for i in order[at : at + many]] for at in range(0, len(order), many)]
        ends = list(accumulate(sum(group.rows for group in window) for window in windows))
        ranges = self._ranges
        mine = (
            (i, deal.rows_of(self.rank, within(ranges, begin, end), start, stop) - begin)
            for i, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        )
        begins = [0, *ends]
        return ahead((partial(self._decode, windows[i], i, at, begins[i]) for i, at in mine if len(at)), self.prefetch)

    def _decode(self, window: list[RowGroup], index: int, at: NDArray[np.int64], begin: int) -> Rows:
        """The rows of a window, which begins at `begin`, that stand at these places of its order."""
        columns = [name for name in self.dataset.arrow_schema().names if name not in self.dataset.unread]
        tables = [read_columns(group, columns) for group in window]
        rows = sum(len(table) for table in tables)
        if self.shuffle:
            at = np.random.default_rng((self.seed, self.epoch, index)).permutation(rows)[at]
            return Rows.of(tables, self.dataset, at)
        decoded = Rows.of(tables, self.dataset, None if np.array_equal(at, np.arange(rows)) else at)
        decoded.row = torch.from_numpy(begin + at)
        return decoded

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
        numbers = [rows.row[low:high] for rows, low, high in pieces if rows.row is not None]
        return Batch(dense, sparse, label, torch.cat(users) if users else None, torch.cat(numbers) if numbers else None)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if distributed else 1
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    if not 0 <= rank < world_size:
        raise UserError(f"rank must lie in [0, {world_size}), got {rank}")
    return rank, world_size
