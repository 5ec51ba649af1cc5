"""Files that are either the old or the new, never half: write beside, rename into place."""

from __future__ import annotations

import ctypes
import fcntl
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
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        os.replace(beside, path)  # an empty folder at `path` is replaced too
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Like `new_folder`, but a folder that is at `path` already is exchanged for the new one in one step, and removed.

    A process that is killed leaves the old folder or the new one at `path` (and perhaps a hidden one beside it).

    Raises:
        UserError: when the file system cannot exchange two folders.
    """
    if not path.is_dir():
        with new_folder(path) as beside:
            yield beside
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        _exchange(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
