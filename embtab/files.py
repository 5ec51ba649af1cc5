"""Files that are either the old or the new, never half: write beside, rename into place.

Other users may write where we do (the system's temporary files, a shared folder), so nothing is trusted by its name:
what we write to was made by us under a name that nobody can foresee, and links, pipes and others' files are left alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embtab.errors import UserError, of_a_full_disk

_HIDDEN = re.compile(r"\..*\.[0-9]+\.[a-z0-9_]{8,}\.tmp", re.DOTALL)  # as `hidden` and `scratch` name theirs


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step; a crash leaves the old file or the new one."""
    with replaced_file(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step; a crash leaves the old file or the new one."""
    with replaced_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields an empty file beside `path` that takes its place when the block ends well, and vanishes when it fails.

    A process that is killed leaves the old file or the new one at `path`, and perhaps a hidden one beside it, which the
    next one clears away.
    """
    with hidden(path, _new_file) as beside:
        yield beside
        sync(beside)
        os.replace(beside, path)


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
    with hidden(path) as beside:
        yield beside
        try:
            os.replace(beside, path)  # an empty folder at `path` is replaced too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UserError(f"{path}: another process wrote it meanwhile; it is kept, and this one is not") from None


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
    with hidden(path) as beside:
        yield beside
        _exchange(beside, path)


@contextmanager
def hidden(path: Path, make: Callable[[Path], None] = Path.mkdir) -> Iterator[Path]:
    """A hidden folder (or file) next to `path`, removed at the end; those of killed processes are removed at the start.

    It is locked while its process lives, so that one that can be locked is nobody's.

    Raises:
        UserError: when the disk is full, or nothing can be written there.
    """
    while True:
        beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path.parent, glob.escape(path.name))
            make(beside)
        except OSError as error:
            # mkdir says "File exists" where a file stands in its way.
            reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
            raise UserError(f"{path}: cannot be written ({reason})") from error
        with held(beside, wait=True) as mine:
            if not mine:  # cleared away between the two lines above
                continue
            try:
                yield beside
                return
            except Exception as error:
                reason = of_a_full_disk(error)
                if reason is None:
                    raise
                raise UserError(f"{path}: cannot be written ({reason}); what was there is as it was") from error
            finally:
                _remove(beside)


def _new_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder among the system's temporary files, removed at the end; those of killed processes at the start.

    Raises:
        UserError: when there is no place for temporary files.
    """
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(f"temporary files cannot be written ({error.strerror}); set TMPDIR") from error
    while True:
        clear(place, "embtab")
        made = tempfile.TemporaryDirectory(prefix=f".embtab.{os.getpid()}.", suffix=".tmp")
        with made as folder, held(Path(folder), wait=True) as mine:
            if mine:
                yield Path(folder)
                return


def clear(folder: Path, name: str = "*") -> None:
    """Removes the hidden files and folders that killed processes left where they wrote `name`, a glob pattern."""
    for left in folder.glob(f".{name}.[0-9]*.tmp"):
        if not _HIDDEN.fullmatch(left.name):
            continue
        with suppress(OSError), held(left, wait=False) as mine:  # others' are theirs to remove
            if mine and left.lstat().st_uid == os.geteuid():
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def held(path: Path, wait: bool) -> Iterator[bool]:
    """Locks a file or folder, and says whether it is there and this process's; links and pipes are nobody's."""
    try:
        opened = open_plain(path, os.O_RDONLY)
    except (FileNotFoundError, NotPlainError):
        yield False
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.path.samestat(os.fstat(opened), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        there = False
    try:
        yield there
    finally:
        os.close(opened)


class NotPlainError(OSError):
    """A link, a pipe or a device stands where a file or folder should."""


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Opens a regular file or a folder by its own name, as `os.open`; never waits, as a pipe without a writer would.

    Raises:
        NotPlainError: where something else stands there.
        OSError: where it cannot be opened.
    """
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe or socket that nobody reads
            raise
        raise NotPlainError(error.errno, "is a link, a pipe or a device", str(path)) from None
    kind = os.fstat(opened).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
        return opened
    os.close(opened)
    raise NotPlainError(errno.EINVAL, "is a link, a pipe or a device", str(path))


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
    try:
        opened = open_plain(folder / ".lock", os.O_WRONLY | os.O_CREAT)
    except NotPlainError:
        raise UserError(f"{folder / '.lock'}: is a link, a pipe or a device; remove it") from None
    with os.fdopen(opened, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing here; wait for it or choose another --out") from None
        yield
