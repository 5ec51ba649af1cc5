"""Loops in C++: the compiler that builds them, threads to run them in, large pages for what they read."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import stat
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
from embtab.files import NotPlainError, open_plain, replaced_file

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")


def compiler(why: str) -> list[str]:
    """The command of the C++ compiler, word by word: what CXX says ("ccache g++" is two words), or g++.

    Args:
        why: who asks, for the error.

    Raises:
        UserError: when there is none.
    """
    asked = _asked_compiler()
    try:
        command = shlex.split(asked)
    except ValueError as error:
        raise UserError(f"{why}: CXX={asked!r} is no command: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise UserError(f"{why}: there is no C++ compiler {asked!r}; install it, or set CXX to another")
    return command


def build(source: Path, why: str, *flags: str) -> ctypes.CDLL:
    """The library made of a file, from `$XDG_CACHE_HOME/embtab` (`~/.cache/embtab`) where it was made before.

    To load a library is to run it, so the folder and the library must be this user's (or root's) and writable by
    nobody else. A library has the name of all that it depends on (source, flags, CXX and processor) and of its own
    content, so that a damaged one is told. It appears at once and whole: processes may build at the same time and be
    killed at any. No compiler is needed where it is there already. Where it cannot be kept, it is made for this
    process alone, and a warning says so.

    `EMBTAB_MARCH` (x86-64-v3, say) names the processors that it is made for, instead of the one that it is made on.

    Args:
        source: a C++ file that includes what compilers come with, and headers beside it.
        why: who asks, for the errors.
        flags: of the compiler, beside FLAGS.

    Raises:
        UserError: where it is not there, and there is no compiler, or it fails, or nothing can be written anywhere.
    """
    march = os.environ.get("EMBTAB_MARCH") or "native"
    flags = (*FLAGS, f"-march={march}", *flags)
    name = f"{source.stem}-{_key(source, flags, march)}"
    try:
        folder = cache_folder()
        kept = _kept(folder, name)
    except OSError as error:
        return _made(source, why, flags, name, error)
    return kept or _made(source, why, flags, name, folder)


def cache_folder() -> Path:
    """Where compiled libraries are kept.

    Raises:
        OSError: where the user has no home folder, and XDG_CACHE_HOME is not set.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache) / "embtab"
    try:
        return Path.home() / ".cache" / "embtab"
    except RuntimeError as error:  # neither HOME nor an entry of the user's
        raise OSError(str(error).rstrip(".")) from None


def _kept(folder: Path, name: str) -> ctypes.CDLL | None:
    """The library that was made before, if it is whole and nobody else could write to it; another one is removed.

    Raises:
        OSError: where the folder is not this user's own, or what is in it cannot be read.
    """
    if folder.exists():
        _check_own(folder, folder.stat())
    for path in sorted(folder.glob(f"{name}-*.so")):
        loaded = _loaded(path, name)
        if loaded is not None:
            return loaded
        path.unlink(missing_ok=True)
    return None


def _made(source: Path, why: str, flags: Sequence[str], name: str, place: Path | OSError) -> ctypes.CDLL:
    """The library, compiled where nobody else can write; `place` is the folder to keep it in, or why there is none."""
    command = compiler(why)
    try:
        with tempfile.TemporaryDirectory(prefix="embtab-") as alone:
            made = Path(alone) / f"{name}.so"
            _run(why, [*command, *flags, str(source), "-o", str(made)])
            try:
                if isinstance(place, OSError):
                    raise place
                return _keep(place, name, made.read_bytes())
            except (OSError, UserError) as error:
                warnings.warn(
                    f"{why} is compiled for this process alone, as it cannot be kept: {error}; "
                    "set XDG_CACHE_HOME to a folder that you, and nobody else, can write to",
                    stacklevel=4,
                )
            return ctypes.CDLL(str(made))
    except OSError as error:
        raise UserError(f"{why} could not be built: {error}") from None


def _keep(folder: Path, name: str, library: bytes) -> ctypes.CDLL:
    """Puts a library into the folder, from where it is loaded."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_own(folder, folder.stat())
    path = folder / f"{name}-{_digest(library)}.so"
    with replaced_file(path) as beside:
        beside.chmod(0o755)
        beside.write_bytes(library)
    loaded = _loaded(path, name)
    if loaded is None:
        raise OSError(f"{path} is not what was written")
    return loaded


def _loaded(path: Path, name: str) -> ctypes.CDLL | None:
    """The library in a file of that name, if the file is its user's own and whole.

    What was looked at is what is run, even where others can exchange a folder above: it is loaded by its descriptor.
    That stays open, for the system's loader takes two libraries of one name, and so of one number, for the same.
    """
    try:
        opened = open_plain(path, os.O_RDONLY)
    except (FileNotFoundError, NotPlainError):  # another process has removed it just now; a link or a pipe
        return None
    try:
        _check_own(path, os.fstat(opened))
        with os.fdopen(os.dup(opened), "rb") as file:
            if path.name == f"{name}-{_digest(file.read())}.so":
                library = ctypes.CDLL(f"/proc/self/fd/{opened}")
                library._name = str(path)
                return library
    except PermissionError:
        pass
    os.close(opened)
    return None


def _check_own(path: Path, found: os.stat_result) -> None:
    """Holds a file or folder to its owner, who is this user or root, and to its mode.

    Raises:
        PermissionError: where it is another's, or others may write to it.
    """
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} is another user's")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written to by others (chmod go-w mends that)")


def _key(source: Path, flags: Sequence[str], march: str) -> str:
    read = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.hpp")))]
    depends = read, flags, _asked_compiler(), _processor() if march == "native" else march
    return _digest(repr(depends).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _asked_compiler() -> str:
    return os.environ.get("CXX") or "g++"


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


def _run(why: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise UserError(f"{why} could not be built by {' '.join(command)}: {said}")


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
