"""Alternating measurements: every arm has its turn in every round, so that a busy machine is busy for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm


class Stopwatch:
    """Times the phases of one turn: by the clock on a CPU, by CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks = [self._mark()]

    def restart(self) -> None:
        """Forgets what came before."""
        self._marks = [self._mark()]

    def lap(self) -> None:
        """Ends a phase."""
        self._marks.append(self._mark())

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def laps(self) -> list[float]:
        """Seconds of each phase."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return [_seconds(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float)
        assert isinstance(stop, float)
        return stop - start
    return start.elapsed_time(stop) / 1000


Arm = Callable[[int, Stopwatch], None]
"""Does turn i, and calls the stopwatch's `lap` at the end of every phase."""


@dataclass(frozen=True)
class Times:
    """Seconds of one phase of one arm in each round.

    Args:
        seconds: float64 [rounds].
        baseline: the same of the arm that ratios are taken to.
    """

    seconds: NDArray[np.float64]
    baseline: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return float(np.median(self.seconds))

    @property
    def tail(self) -> float:
        """The 99th percentile."""
        return float(np.percentile(self.seconds, 99))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios to the baseline: below 1 is faster."""
        return float(np.median(self.seconds / self.baseline))


def alternate(
    arms: Mapping[str, Arm], rounds: int, device: torch.device, warmup: int = 2, title: str = ""
) -> dict[str, NDArray[np.float64]]:
    """Seconds [rounds, phases] by arm: A B C, B A C, ...

    Every round has all arms, in an order of its own: what an arm finds in the caches is what the one before has left,
    and the same neighbour each time would make a difference where there is none.

    Args:
        arms: by name.
        rounds: how many are kept.
        device: where the arms work.
        warmup: rounds that are run first and thrown away.
        title: of the progress bar.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in arms}
    for i in tqdm(range(warmup + rounds), desc=title, unit="round", leave=False, disable=not title):
        for name, arm in random.Random(i).sample(list(arms.items()), len(arms)):
            watch = Stopwatch(device)
            arm(i, watch)
            seconds[name].append(watch.laps())
    return {name: np.array(rows[warmup:]) for name, rows in seconds.items()}


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The median of a few calls, after one that is thrown away."""

    def arm(_: int, watch: Stopwatch) -> None:
        call()
        watch.lap()

    return float(np.median(alternate({"": arm}, rounds, device, warmup=1)[""]))
