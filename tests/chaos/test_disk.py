"""A disk that is full, a folder that nobody may write, two processes on one output: one clear line, nothing half."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import ONNX_RUNTIMES, Place, said_of, start
from contents import files
from long_commands import COMMANDS, RESUMED, prepared

FULL = "cannot be written|No space left on device|File too large|runs failed"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with these options; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def refused(place: Place, name: str, out: Path, before: Callable[[], None] | None = None) -> None:
    """A command that has no room for its output says so in a line, and leaves what was there."""
    command = COMMANDS[name]
    command.before(place, out)
    earlier = files(out) if out.exists() else None
    line = said_of(command.argv(place, out), place, before)
    assert any(words in line for words in FULL.split("|")), line
    if name in RESUMED:
        command.check_left(out, {})
    else:
        assert (files(out) if out.exists() else None) == earlier
    assert [path for path in out.parent.rglob(".*") if path.name != ".lock"] == []
    assert [path for path in place.temporary.iterdir() if path.name != ONNX_RUNTIMES] == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 2000])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_may_be_large(place: Place, tmp_path: Path, name: str, size: int) -> None:
    refused(place, name, tmp_path / "out", limited(size))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full(place: Place, small_disk: Callable[[str], Path], name: str) -> None:
    refused(place, name, small_disk(f"size={COMMANDS[name].room}") / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_read_only(place: Place, small_disk: Callable[[str], Path], name: str) -> None:
    out = small_disk("size=2m") / "out"
    COMMANDS[name].before(place, out)
    argv, earlier = COMMANDS[name].argv(place, out), files(out.parent)
    subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
    assert "Read-only file system" in said_of(argv, place)
    assert files(out.parent) == earlier


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_where_a_folder_should_be(place: Place, tmp_path: Path, name: str) -> None:
    argv = COMMANDS[name].argv(place, tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "file").write_text("mine")
    argv = [word.replace(str(tmp_path / "out"), str(tmp_path / "file" / "out")) for word in argv]
    line = said_of(argv, place)
    assert str(tmp_path / "file") in line
    assert "Not a directory" in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "mine"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once(place: Place, tmp_path: Path, name: str) -> None:
    """One wins, and the other refuses or is as good; what is there is of one of them."""
    command, whole = COMMANDS[name], tmp_path / "whole"
    command.before(place, whole)
    first = start(place, command.argv(place, whole), tmp_path)
    first.join()
    for attempt in range(command.races):
        out, folders = tmp_path / f"out{attempt}", [tmp_path / f"{attempt}-{i}" for i in range(2)]
        command.before(place, out)
        argv = command.argv(place, out)
        for folder in folders:
            folder.mkdir()
        two = [start(place, argv, folder) for folder in folders]
        for process in two:
            process.join()
        codes = sorted(process.exitcode or 0 for process in two)
        said = [(folder / "said.txt").read_text() for folder in folders]
        assert codes in ([0, 0], [0, 2]), said
        assert "Traceback" not in "".join(said)
        assert sum(text.count("embtab: error: ") for text in said) == codes.count(2)
        assert command.content(out) == command.content(whole)
    assert [path for path in tmp_path.rglob(".*") if path.name != ".lock"] == []


@pytest.mark.slow
def test_a_limit_leaves_the_former_bundle(place: Place, tmp_path: Path) -> None:
    refused(place, "export", tmp_path / "out", limited(1000))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_a_compiler_without_room(place: Place, tmp_path: Path) -> None:
    """All that embtab itself writes fits; what the compiler writes does not."""
    command, out = COMMANDS["export aoti"], tmp_path / "out"
    line = said_of(command.argv(place, out), place, limited(1_000_000))
    assert "the model cannot be compiled: " in line
    assert "g++ " not in line
    assert os.listdir(tmp_path) == []
    assert list(place.temporary.glob(".embtab*")) == []
