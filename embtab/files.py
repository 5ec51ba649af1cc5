"""Files that are either the old or the new, never half: write beside, rename into place."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embtab.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step; a crash leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file is on the disk, so that a rename after it never outlives its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it fails.

    Raises:
        UserError: when `path` exists already and holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists; remove it or choose another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as beside:
        yield beside
        os.replace(beside, path)  # an empty folder at `path` is replaced too


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Like `new_folder`, but a folder that is at `path` already is exchanged for the new one in one step, and removed.

    A process that is killed leaves the old folder or the new one at `path`, and perhaps a hidden one beside it, which
    the next one clears away.

    Raises:
        UserError: when the file system cannot exchange two folders.
    """
    if not path.is_dir():
        with new_folder(path) as beside:
            yield beside
        return
    with _beside(path) as beside:
        yield beside
        _exchange(beside, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty hidden folder next to `path`, removed at the end; those of killed processes are removed at the start.

    The folder is locked while its process lives, so that one that can be locked is nobody's.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with _held(left, wait=False) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    while True:
        beside.mkdir(exist_ok=True)
        with _held(beside, wait=True) as mine:
            if not mine:  # cleared away between the two lines above
                continue
            try:
                yield beside
                return
            finally:
                shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _held(folder: Path, wait: bool) -> Iterator[bool]:
    """Locks a folder, and says whether it is there and this process's."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.path.samestat(os.fstat(opened), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        there = False
    try:
        yield there
    finally:
        os.close(opened)


def _exchange(one: Path, other: Path) -> None:
    """Exchanges two folders' names: renameat2 with RENAME_EXCHANGE, which Python has no name for."""
    here, exchange = -100, 2
    if ctypes.CDLL(None, use_errno=True).renameat2(here, bytes(one), here, bytes(other), exchange):
        reason = os.strerror(ctypes.get_errno())
        raise UserError(f"{other}: cannot be replaced in one step ({reason}); remove it first, or write elsewhere")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process, so that two runs never write to one output; released by any kind of exit.

    Raises:
        UserError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing here; wait for it or choose another --out") from None
        yield
