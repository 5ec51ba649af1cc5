"""Trainings of a sweep in this process or in several, none of whose failures ends the sweep."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from embtab.compare.summary import Row
from embtab.compare.sweep import Cell, Sweep
from embtab.errors import InfeasibleBudget
from embtab.planning import Plan


@dataclass(frozen=True)
class Job:
    """One training, and the plans it is measured with, by the keys of their cells; they differ in precision alone."""

    sweep: Sweep
    plans: Mapping[str, Plan]
    seed: int

    @property
    def cells(self) -> list[str]:
        """The keys of its cells."""
        return list(self.plans)

    def run(self) -> dict[str, Row]:
        """Measurements by cell."""
        from embtab.compare import train

        return train.train(self.sweep, self.plans, self.seed)


@dataclass(frozen=True)
class SearchJob:
    """A search of a cell's tables, by the key of the cell; it goes on from what an earlier run left in its folder."""

    sweep: Sweep
    cell: Cell
    key: str
    folder: Path

    @property
    def cells(self) -> list[str]:
        """Its key alone."""
        return [self.key]

    def run(self) -> dict[str, Row]:
        """Measurements by cell."""
        from embtab.compare import searched

        return {self.key: searched.search(self.sweep, self.cell, self.folder)}


AnyJob = Job | SearchJob
Outcome = tuple[str, float, dict[str, Row]]
"""A job's key, its seconds, and the status and measurements of each of its cells."""


def outcomes(jobs: Mapping[str, AnyJob], at_a_time: int) -> Iterator[Outcome]:
    """The outcome of each job as it ends, in any order.

    When a process dies (killed for its memory, say), those not done are run again one by one, each in a process of its
    own, so that the one at fault is found and recorded, and the others get their results.
    """
    if at_a_time == 1:
        yield from (_outcome(key, job) for key, job in jobs.items())
        return
    left = dict(jobs)
    try:
        for outcome in _side_by_side(jobs, at_a_time):
            del left[outcome[0]]
            yield outcome
    except BrokenProcessPool:
        for key, job in left.items():
            try:
                yield from _side_by_side({key: job}, 1)
            except BrokenProcessPool:
                yield key, 0.0, _failed(job, "the process died; did it run out of memory?")


def _side_by_side(jobs: Mapping[str, AnyJob], at_a_time: int) -> Iterator[Outcome]:
    # Spawned, since a fork of a process that has used OpenMP may hang.
    with ProcessPoolExecutor(at_a_time, get_context("spawn"), _end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(_outcome, key, job) for key, job in jobs.items()]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process once the one that started it is gone.

    A worker waits for its next job in vain when its parent is killed, for ever; or it trains on, and writes into the
    folder of a search that another run has taken up.
    """

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _outcome(key: str, job: AnyJob) -> Outcome:
    """Trains one cell; a failure is a result too, and the rest of the sweep goes on."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # also in processes that the command line did not start
    started = time.perf_counter()
    try:
        found = {cell: {"status": "ok", **row} for cell, row in job.run().items()}
    except InfeasibleBudget as error:  # which some searches find only on the way
        refused = {"status": "infeasible", "min_bytes": error.min_bytes, "error": str(error)}
        found = dict.fromkeys(job.cells, refused)
    except Exception as error:
        found = _failed(job, " ".join(f"{type(error).__name__}: {error}".split()))
    return key, time.perf_counter() - started, found


def _failed(job: AnyJob, why: str) -> dict[str, Row]:
    return {cell: {"status": "failed", "error": why} for cell in job.cells}
