"""Folders that appear whole or not at all, and what killed processes leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embtab.files import new_folder, replaced_folder

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
