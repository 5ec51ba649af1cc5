"""How much memory something takes when it is done alone."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The largest memory of a fresh process that does this, its libraries included.

    On a GPU it is the largest memory that torch held there. None where the system does not tell.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, work, device, torch.get_num_threads()).result()


def _alone(work: Callable[[], object], device: torch.device, threads: int) -> int | None:
    torch.set_num_threads(threads)
    work()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else most_resident()


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
