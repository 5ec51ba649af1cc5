"""How much memory one arm takes when it works alone."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from embtab.bench.workload import Case

if TYPE_CHECKING:
    from embtab.bench.run import Settings


def peak_bytes(what: str, settings: Settings, case: Case, arm: str) -> int | None:
    """The largest memory of a fresh process that runs this arm a few times, its libraries included.

    On a GPU it is the largest memory that torch held there. None where the system does not tell.
    """
    alone = replace(settings, arms=(arm,), baseline=arm, rounds=3, memory=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_alone, what, alone, case, torch.get_num_threads()).result()


def _run_alone(what: str, settings: Settings, case: Case, threads: int) -> int | None:
    from embtab.bench.run import turns

    torch.set_num_threads(threads)
    list(turns(what, settings, case))
    return torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else most_resident()


def most_resident() -> int | None:
    """The most memory that this process ever had, in bytes, where the system tells."""
    return _proc("/proc/self/status", "VmHWM")


def free_memory() -> int:
    """Bytes that new arrays may take; without limit where the system does not tell."""
    found = _proc("/proc/meminfo", "MemAvailable")
    return sys.maxsize if found is None else found


def _proc(path: str, name: str) -> int | None:
    try:
        with open(path) as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None
