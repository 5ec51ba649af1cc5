"""The epochs of a training, one after the other, and where a run that goes on in the middle of one stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from embtab.datasets.reader import Batch, ParquetBatches


class Epochs:
    """One epoch of batches after another, each shuffled in its own way; it knows where it stands.

    Args:
        loader: a DataLoader over `ParquetBatches`.
        per_epoch: tells after how many batches the consumer considers an epoch finished.
    """

    def __init__(self, loader: DataLoader[Batch], per_epoch: Callable[[], float]):
        self.loader = loader
        self.batches: ParquetBatches = loader.dataset  # type: ignore[assignment]
        self.per_epoch = per_epoch
        self.through: Callable[[Iterator[Batch]], Iterator[Batch]] = iter
        """What the batches pass through on their way to the consumer; it may take some ahead."""
        self.epoch = 0
        self.taken = 0
        self._before = 0
        self._resumed = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    @property
    def done(self) -> int:
        """Batches of the epoch that are done; what was done before a change of their size, in today's batches."""
        return self._before + self.taken

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch, or the rest of the one that `load_state_dict` set."""
        if self.done and not self._resumed:
            self.begin(self.epoch + 1)
        self.batches.load_state_dict(self._position(), self._workers)
        return self._count(self.through(iter(self.loader)))

    def begin(self, epoch: int) -> None:
        """Makes the next iteration this epoch."""
        self.epoch, self.taken, self._before = epoch, 0, 0
        self.batches.set_epoch(epoch)

    def _count(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.taken += 1  # before the consumer sees it: a state taken while it holds batch n says n + 1
            self._resumed = False
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, what is left of it, and what identifies the stream; the same on every rank."""
        if self.done >= min(len(self), self.per_epoch()):
            return self._position() | self.batches.start(self.epoch + 1)
        return self._position()

    def _position(self) -> dict[str, Any]:
        return self.batches.state_dict() | {"batch": self.taken, "workers": self._workers}

    @property
    def _workers(self) -> int:
        return max(self.loader.num_workers, 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a state, of any number of processes and workers and any batch size.

        Raises:
            UserError: when it belongs to other data or another seed.
        """
        self.batches.load_state_dict(state, self._workers)
        self.epoch, self.taken, self._resumed = state["epoch"], self.batches.state_dict()["batch"], True
        self._before = len(self) - self.batches.batches_left() - self.taken
        if self.done == len(self):  # fewer rows are left than there are processes
            self.begin(self.epoch + 1)
