"""Folders that appear whole or not at all, and what killed processes leave."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embtab.errors import UserError, of_a_full_disk
from embtab.files import new_folder, replaced_file, replaced_folder, scratch

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
    (tmp_path / ".file.123.tmp").touch()  # a killed process's
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
