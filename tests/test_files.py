"""Folders that appear whole or not at all, and what killed processes leave."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embtab.errors import UserError, of_a_full_disk
from embtab.files import clear, locked, new_folder, replaced_file, replaced_folder, scratch

SCRATCH = """
import os, signal, sys, tempfile
from embtab.files import scratch
tempfile.tempdir = sys.argv[1]
with scratch() as folder:
    (folder / "file").touch()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""
WRITES = """
import sys
from pathlib import Path
from embtab.files import new_folder, replaced_folder
with (new_folder if sys.argv[2] == "new" else replaced_folder)(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("theirs")
    print("writing", flush=True)
    sys.stdin.read()
"""


def writing(path: Path, kind: str) -> subprocess.Popen:
    """A process that is within the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def failing(kind, path: Path, error: Exception) -> None:
    with kind(path):
        raise error


def hidden(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("kind", ["new", "replaced"])
def test_what_a_killed_process_leaves_is_cleared_away_by_the_next(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out [1]*"
    if kind == "replaced":
        out.mkdir()
        (out / "file").write_text("old")
    process = writing(out, kind)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(hidden(tmp_path)) == 1
    with (new_folder if kind == "new" else replaced_folder)(out) as folder:
        assert hidden(tmp_path) == [folder.name]
        (folder / "file").write_text("mine")
    assert (out / "file").read_text() == "mine"
    assert hidden(tmp_path) == []


def test_the_folder_of_a_process_that_lives_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = writing(out, "replaced")
    with replaced_folder(out) as folder:
        (folder / "file").write_text("mine")
        assert len(hidden(tmp_path)) == 2
    assert (out / "file").read_text() == "mine"
    process.communicate()
    assert process.returncode != 0  # `out` was free when it began: it does not write over what came since
    assert (out / "file").read_text() == "mine"
    assert hidden(tmp_path) == []


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_old_or_the_new_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.123.0123456789abcdef.tmp").touch()  # a killed process's
    with replaced_file(path) as beside:
        beside.write_text("mine")
        assert hidden(tmp_path) == [beside.name]
    with pytest.raises(ValueError, match="no"):
        failing(replaced_file, path, ValueError("no"))
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", [new_folder, replaced_folder, replaced_file])
def test_a_full_disk_is_said_of_what_was_to_be_written(kind, tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos 640 vs 534")  # as torch puts it
    error.__context__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        failing(kind, tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [new_folder, replaced_folder, replaced_file])
def test_a_file_in_the_place_of_the_folder_is_said(kind, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match=r"out: cannot be written \(Not a directory\)"), kind(tmp_path / "data" / "out"):
        pytest.fail("there is no place for it")
    assert (tmp_path / "data").read_text() == "a file"


def test_folders_that_the_system_cannot_exchange_stay_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    replacing = replaced_folder(out)
    (replacing.__enter__() / "file").write_text("new")
    out.rename(tmp_path / "moved")  # nothing is left to be exchanged with
    with pytest.raises(UserError, match="cannot be replaced in one step"):
        replacing.__exit__(None, None, None)
    assert (tmp_path / "moved" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["moved"]


def test_only_a_full_disk_is_one() -> None:
    assert of_a_full_disk(ValueError("I/O error: File too large (os error 27)")) == "File too large"
    assert of_a_full_disk(ValueError("no such file (os error 2)")) is None
    assert of_a_full_disk(OSError(errno.EACCES, "no")) is None


def test_temporary_folders_of_killed_processes_go_and_others_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    with scratch() as mine:
        subprocess.run([sys.executable, "-c", SCRATCH, str(tmp_path), "killed"])
        assert len(hidden(tmp_path)) == 2
        subprocess.run([sys.executable, "-c", SCRATCH, str(tmp_path), "ends"], check=True)
        assert hidden(tmp_path) == [mine.name]
    assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a folder", "link to nothing", "socket"])
def test_what_others_put_among_temporary_files_neither_blocks_nor_is_followed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, victim = tmp_path / "tmp", tmp_path / "victim"
    place.mkdir()
    victim.mkdir()
    (victim / "precious").touch()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    for name in ("embtab", "out"):
        trap = place / f".{name}.1.0123456789abcdef.tmp"
        if kind == "pipe":
            os.mkfifo(trap)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(trap))
        else:
            trap.symlink_to({"pipe": tmp_path / "pipe", "folder": victim, "nothing": tmp_path / "no"}[kind.split()[-1]])
    with scratch() as folder:
        (folder / "file").touch()
    with replaced_file(place / "out") as beside:
        beside.write_text("mine")
    with replaced_folder(place / "folder"):
        pass
    assert (place / "out").read_text() == "mine"
    assert os.listdir(victim) == ["precious"]
    assert sorted(os.listdir(place)) == [
        ".embtab.1.0123456789abcdef.tmp",
        ".out.1.0123456789abcdef.tmp",
        *("folder", "out"),
    ]


def test_names_of_temporary_files_cannot_be_foreseen_and_what_is_there_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for _ in range(3):
        with replaced_file(tmp_path / "out") as beside:
            names.add(beside.name)
    assert len(names) == 3
    monkeypatch.setattr("secrets.token_hex", lambda _: "0123456789abcdef")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".out.{os.getpid()}.0123456789abcdef.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"out: cannot be written"), replaced_file(tmp_path / "out"):
        pytest.fail("a link stands there")
    assert (tmp_path / "victim").read_text() == "precious"


def test_only_what_is_named_as_ours_and_is_ours_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.1.tmp").mkdir()
    (tmp_path / ".out.2024.report.tmp").touch()
    (tmp_path / ".out.1.0123456789abcdef.tmp").mkdir()
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    clear(tmp_path)
    assert len(hidden(tmp_path)) == 3
    monkeypatch.undo()
    clear(tmp_path)
    assert sorted(hidden(tmp_path)) == [".out.1.tmp", ".out.2024.report.tmp"]


def test_a_lock_is_no_link_and_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"\.lock: is a link"), locked(tmp_path):
        pytest.fail("a link stands there")
    assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock: is a link, a pipe"), locked(tmp_path):
        pytest.fail("a pipe stands there")
    (tmp_path / ".lock").unlink()
    with locked(tmp_path), pytest.raises(UserError, match="another process is writing here"), locked(tmp_path):
        pytest.fail("it is held")
