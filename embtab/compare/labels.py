"""Where the name of each line stands in a chart: in a column right of all points, none over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LINE = 12.0
"""Pixels from one name to the next."""
CHARACTER = 5.8
"""Pixels of a character, on average."""
NARROWEST = 300
"""Pixels that a chart is at least wide."""
LEFT, GAP = 0.05, 0.045
"""Shares of the width before the first point, and between the last one and the names."""


@dataclass(frozen=True)
class Axis:
    """A continuous axis, linear or logarithmic.

    Args:
        low: where it begins.
        high: where it ends.
        log: whether equal ratios are equal lengths.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float], before: float, after: float, log: bool) -> Axis:
        """From a share of the length before the smallest value to a share after the largest."""
        low, high = _straight(min(values), log), _straight(max(values), log)
        if low == high:  # one value stands in the middle
            half = math.log(2) if log else abs(low) / 20 or 1.0
            low, high = low - half, high + half
        unit = (high - low) / (1 - before - after)
        return cls(_back(low - before * unit, log), _back(high + after * unit, log), log)

    def share(self, value: float) -> float:
        """How far along the axis a value stands, 0 to 1."""
        low, high = _straight(self.low, self.log), _straight(self.high, self.log)
        return (_straight(value, self.log) - low) / (high - low)

    def value(self, share: float) -> float:
        """The value that stands so far along."""
        low, high = _straight(self.low, self.log), _straight(self.high, self.log)
        return _back(low + share * (high - low), self.log)


@dataclass(frozen=True)
class Names:
    """Room for the names of lines.

    Args:
        longest: characters of the longest one.
    """

    longest: int

    @property
    def room(self) -> float:
        """The share of the width that they take; names that need more are cut off."""
        return min(0.4, (CHARACTER * self.longest + 8) / NARROWEST)

    @property
    def limit(self) -> float:
        """Pixels that a name may take."""
        return self.room * NARROWEST - 6

    def axis(self, nbytes: Sequence[int]) -> Axis:
        """The axis of bytes that leaves room for them."""
        return Axis.around(nbytes, LEFT, GAP + self.room, log=True)

    def start(self, axis: Axis) -> float:
        """Where they begin on that axis."""
        return axis.value(1 - self.room)


def spread(places: Sequence[float], least: float, most: float) -> list[float]:
    """Pixels near the given ones, in their order, `LINE` apart and from `least` to `most` while there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    step = min(LINE, (most - least) / max(len(places) - 1, 1))
    moved: dict[int, float] = {}
    below = least - step
    for i in order:
        moved[i] = below = max(places[i], below + step)
    above = most + step
    for i in reversed(order):
        moved[i] = above = min(moved[i], above - step)
    return [moved[i] for i in range(len(places))]


def _straight(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _back(value: float, log: bool) -> float:
    return math.exp(value) if log else value
