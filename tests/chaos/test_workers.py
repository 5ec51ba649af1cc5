"""The workers of a sweep end with it, whatever ends it: those that work, and those that wait for work."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import sweeping

from embtab.files import held


def test_the_workers_of_a_killed_sweep_are_gone(tmp_path: Path) -> None:
    files, told = (tmp_path / "waits", tmp_path / "works"), tmp_path / "told"
    parent = get_context("spawn").Process(target=sweeping.sweep, args=(files, told))
    parent.start()
    until(lambda: told.exists() and told.read_text() == "0", seconds=120)
    assert not any(gone(file) for file in files)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    until(lambda: all(gone(file) for file in files), seconds=10)


def gone(file: Path) -> bool:
    """Whether the process that has locked a file has ended."""
    with held(file, wait=False) as mine:
        return mine


def until(true, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)
