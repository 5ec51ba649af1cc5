"""Loops in C++: the compiler that builds them, threads to run them in, large pages for what they read."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from embtab.errors import UserError

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


def compiler(why: str) -> str:
    """The command of the C++ compiler: what CXX says, or g++.

    Args:
        why: who asks, for the error.

    Raises:
        UserError: when there is none.
    """
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        raise UserError(f"{why}: there is no C++ compiler {command!r}; install it, or set CXX to another")
    return command


def build(source: Path, why: str, *flags: str) -> ctypes.CDLL:
    """The library made of a file, from `$XDG_CACHE_HOME/embtab` (`~/.cache/embtab`) where it was made before.

    A library there has the name of all that it depends on (source, flags, compiler and processor), and appears at once
    and whole, so that processes may build at the same time and be killed at any.

    Args:
        source: a C++ file that includes what compilers come with, and headers beside it.
        why: who asks, for the errors.
        flags: of the compiler, beside FLAGS.

    Raises:
        UserError: where there is no compiler, or it fails.
    """
    command = compiler(why)
    version = _run(why, [command, "--version"])
    read = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.hpp")))]
    depends = read, FLAGS, flags, command, version, _processor()
    key = hashlib.sha256(repr(depends).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embtab"
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            made = Path(building) / library.name
            _run(why, [command, *FLAGS, *flags, str(source), "-o", str(made)])
            made.replace(library)
    return ctypes.CDLL(str(library))


def build_or_warn(source: Path, what: str, *flags: str) -> ctypes.CDLL | None:
    """The same for what torch computes as well, only slower: where it can't be built there is a warning, and None."""
    try:
        return build(source, what, *flags)
    except UserError as error:
        warnings.warn(f"{what} is computed by torch, which takes longer: {error}", stacklevel=2)
        return None


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that let go of Python's lock, each but the first in a thread of its own."""
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls) - 1) as pool:
        others = [pool.submit(call) for call in calls[1:]]
        return [calls[0](), *(other.result() for other in others)]


def in_large_pages(memory: Tensor) -> Tensor:
    """The same tensor, new and on a CPU, whose memory will come in large pages where the system has them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        skipped = -memory.data_ptr() % mmap.PAGESIZE
        if memory.nbytes > skipped:
            _advise()(memory.data_ptr() + skipped, memory.nbytes - skipped, mmap.MADV_HUGEPAGE)
    return memory


@cache
def _advise() -> Any:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def _run(why: str, command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise UserError(f"{why} could not be built by {' '.join(command)}: {said}")
    return done.stdout


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
