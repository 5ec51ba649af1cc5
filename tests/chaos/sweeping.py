"""A sweep whose jobs tell from outside whether their processes live. No test itself."""

import fcntl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from embtab.compare.workers import outcomes

HELD: list[IO[str]] = []
"""Locks that a process keeps until it ends."""


@dataclass(frozen=True)
class Holding:
    """A job that locks its file for as long as its process lives.

    Attributes:
        file: its own.
        others: of the jobs that must have begun before it goes on, so that each has a process to itself.
        seconds: that it takes.
    """

    file: Path
    others: tuple[Path, ...]
    seconds: float

    cells = ("cell",)

    def run(self) -> dict[str, dict[str, object]]:
        file = self.file.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        HELD.append(file)
        while not all(other.exists() for other in self.others):
            time.sleep(0.05)
        time.sleep(self.seconds)
        return {"cell": {}}


def sweep(files: tuple[Path, Path], told: Path) -> None:
    """One job ends at once, and its worker waits for a next one; the other has work for a long time."""
    jobs = {f"{seconds}": Holding(file, files, seconds) for file, seconds in zip(files, (0, 600), strict=True)}
    for key, _, _ in outcomes(jobs, 2):
        told.write_text(key)
