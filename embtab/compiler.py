"""The C++ compiler of this machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from embtab.errors import UserError

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


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


def build(source: Path) -> ctypes.CDLL:
    """The library made of a file, from `$XDG_CACHE_HOME/embtab` (`~/.cache/embtab`) where it was made before.

    A library there has the name of all that it depends on (source, flags, compiler and processor), and appears at once
    and whole, so that processes may build at the same time and be killed at any.

    Raises:
        UserError: where there is no compiler, or it fails.
    """
    command = compiler("the native backend")
    version = _run([command, "--version"])
    key = hashlib.sha256(repr((source.read_bytes(), FLAGS, command, version, _processor())).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embtab"
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            made = Path(building) / library.name
            _run([command, *FLAGS, str(source), "-o", str(made)])
            made.replace(library)
    return ctypes.CDLL(str(library))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise UserError(f"the native backend could not be built by {' '.join(command)}: {said}")
    return done.stdout


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
