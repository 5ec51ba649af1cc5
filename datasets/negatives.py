"""Negatives: items that a user never touched, drawn uniformly or by popularity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embtab.errors import UserError

Ints = NDArray[np.int64]
SAMPLERS = ("uniform", "popularity")
_ROUNDS = 30


class Negatives:
    """Draws items that a user never touched in the events given.

    Args:
        users: int64 [E], the user of each event, 0..U-1.
        items: int64 [E], the item of each event, 0..I-1.
        num_items: I.
        sampler: "uniform", or "popularity" (in proportion to an item's events).

    Raises:
        UserError: for an unknown sampler.
    """

    def __init__(self, users: Ints, items: Ints, num_items: int, sampler: str = "uniform") -> None:
        if sampler not in SAMPLERS:
            raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        self.num_items = num_items
        self.touched = np.unique(users * num_items + items)
        self.chances = np.ones(num_items, np.int64)
        if sampler == "popularity":
            self.chances = np.bincount(items, minlength=num_items)
        self._steps = np.cumsum(self.chances)

    def untouched(self, user: int) -> Ints:
        """The items that can be drawn for a user, in ascending order."""
        low, high = np.searchsorted(self.touched, [user * self.num_items, (user + 1) * self.num_items])
        open_ = self.chances > 0
        open_[self.touched[low:high] - user * self.num_items] = False
        return np.flatnonzero(open_)

    def draw(self, users: Ints, count: int, rng: np.random.Generator) -> Ints:
        """Distinct items for each user named, int64 [T, count].

        Args:
            users: int64 [T]; a user may occur more than once, with draws of its own each time.
            count: items for each.
            rng: where the draws come from.

        Raises:
            UserError: when a user has touched so many items that fewer than `count` are left.
        """
        drawn = self._propose((len(users), count), rng)
        open_rows = np.arange(len(users))
        for _ in range(_ROUNDS):
            refused = self._refused(users[open_rows], drawn[open_rows])
            open_rows, refused = open_rows[refused.any(1)], refused[refused.any(1)]
            if not len(open_rows):
                return drawn
            rows, columns = np.nonzero(refused)
            drawn[open_rows[rows], columns] = self._propose(len(rows), rng)
        for row in open_rows:  # of users who touched nearly everything: choose among what is left
            left = self.untouched(int(users[row]))
            if len(left) < count:
                raise UserError(
                    f"user number {users[row]} leaves {len(left)} of {self.num_items} items untouched, too few for "
                    f"{count} negatives; ask for fewer"
                )
            chances = self.chances[left] / self.chances[left].sum()
            drawn[row] = rng.choice(left, count, replace=False, p=chances)
        return drawn

    def _propose(self, shape: int | tuple[int, int], rng: np.random.Generator) -> Ints:
        found: Ints = np.searchsorted(self._steps, rng.integers(0, self._steps[-1], shape), side="right")
        return found

    def _refused(self, users: Ints, drawn: Ints) -> NDArray[np.bool_]:
        """Which draws are items of the user, or repeat an earlier draw of the row."""
        keys = users[:, None] * self.num_items + drawn
        at = np.minimum(np.searchsorted(self.touched, keys), len(self.touched) - 1)
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        repeats = np.zeros(drawn.shape, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        refused: NDArray[np.bool_] = (self.touched[at] == keys) | repeats
        return refused
