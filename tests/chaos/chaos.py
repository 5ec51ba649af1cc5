"""Commands of embtab in processes that are killed, starved of disk, or raced against each other.

A command that is to be killed is forked from a process that has imported everything, so that a kill at a random moment
hits its work and not three seconds of imports; what runs is `embtab.cli.main` all the same.
"""

import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("embtab.training.cli", "embtab.compare.run", "embtab.compare.train", "embtab.compare.searched"),
        *("embtab.compare.search_grid", "embtab.sequences.run", "embtab.sequences.train", "embtab.commands.plan"),
        *(
            "embtab.bundle",
            "embtab.bundle.delta_writer",
            "embtab.bundle.materialise",
            "embtab.serving.exported",
            "embtab.serving.ranker",
        ),
        *("embtab.convert.dense", "embtab.convert.fine_tune", "embtab.datasets.synthetic", "embtab.datasets.criteo"),
        *("embtab.datasets.movielens", "embtab.datasets.table", "embtab.datasets.sequences"),
    ]
)
Content = dict[str, object]


ONNX_RUNTIMES = ".ses"
"""The file that ONNX Runtime makes among the temporary ones, and keeps."""


@dataclass(frozen=True)
class Place:
    """What all commands of a test share: a prepared dataset, configurations, a checkpoint, dense tables, a bundle."""

    root: Path

    @property
    def temporary(self) -> Path:
        """The folder of temporary files of every command here."""
        return self.root / "temporary"

    @property
    def environment(self) -> dict[str, str]:
        """Where commands put what is no output: temporary files, and what compilers keep for the next time."""
        return {"TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": str(self.root / "compiled")}

    def made(self, name: str, make: Callable[["Place", Path], object]) -> str:
        """The path of a file or folder that few commands read, made when it is first asked for."""
        path = self.root / "made" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            make(self, path)
        return str(path)


@dataclass(frozen=True)
class Command:
    """A command, and how its output is judged.

    Attributes:
        argv: of a run into a folder, which may hold what an earlier run left.
        content: of a complete output, without what no two runs share; raises when it is not complete.
        sound: checks what a kill left; None: there is no output, or a complete one.
        before: makes what is there before the first run.
        room: bytes of a disk that is too small for its output.
        kills: that it has to stand.
        races: of two at once.
    """

    argv: Callable[[Place, Path], list[str]]
    content: Callable[[Path], Content]
    sound: Callable[[Path, Content], None] | None = None
    before: Callable[[Place, Path], object] = lambda place, out: None
    room: str = "20k"
    kills: int = 20
    races: int = 3

    def check_left(self, out: Path, expected: Content) -> None:
        """Checks what a kill left."""
        if self.sound is not None:
            self.sound(out, expected)
        else:
            assert not out.exists() or self.content(out) == expected


def start(place: Place, argv: list[str], folder: Path) -> BaseProcess:
    """Starts a command in a folder, from a process that has imported what it needs."""
    process = FORKS.Process(target=_main, args=(argv, folder, place.environment))
    process.start()
    return process


def _main(argv: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Becomes the command."""
    from embtab import cli

    os.chdir(folder)
    os.environ |= environment
    tempfile.tempdir = None  # found anew
    with (folder / "said.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(180, exit=True)  # a run that hangs says where
    cli.main(argv)


def run(place: Place, argv: list[str], folder: Path | None = None) -> float:
    """Runs a command to its good end; gives its seconds."""
    started = time.perf_counter()
    process = start(place, argv, folder or place.root)
    process.join()
    assert process.exitcode == 0, ((folder or place.root) / "said.txt").read_text()[-2000:]
    return time.perf_counter() - started


def killed_again_and_again(place: Place, command: Command, folder: Path, kills: int, seed: int) -> float:
    """Kills a command at random moments of its duration, and now and then lets it end: what it then gives must be what
    an undisturbed run gives, and nothing of the killed ones may be left.

    Returns:
        The duration of an undisturbed run in seconds.
    """
    moments = random.Random(seed)
    folder.mkdir()
    whole, out = folder / "whole", folder / "out"
    command.before(place, whole)
    seconds = run(place, command.argv(place, whole), folder)
    expected = command.content(whole)
    command.before(place, out)
    done = 0
    while done < kills:
        process = start(place, command.argv(place, out), folder)
        last_chance = done % 5 == 4  # then it may end
        process.join(None if last_chance and moments.random() < 0.5 else moments.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            done += 1
            command.check_left(out, expected)
            continue
        assert process.exitcode == 0, (folder / "said.txt").read_text()[-2000:]
        _judged(place, command, folder, expected)
        shutil.rmtree(out)
        command.before(place, out)
    process = start(place, command.argv(place, out), folder)
    process.join()
    assert process.exitcode == 0, (folder / "said.txt").read_text()[-2000:]
    _judged(place, command, folder, expected)
    return seconds


def _judged(place: Place, command: Command, folder: Path, expected: Content) -> None:
    """Compares the output with that of an undisturbed run, and looks for what killed processes left."""
    found = command.content(folder / "out")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    other = [name for name in found if found[name] != expected[name]]
    assert other == [], other
    left = [*folder.rglob(".*"), *place.temporary.iterdir()]
    # The lock of a folder's writers, and what a compiler still writes.
    kept = (".lock", ONNX_RUNTIMES, "cc*")
    assert [path for path in left if not any(map(path.match, kept))] == []


def said_of(argv: list[str], place: Place, before: Callable[[], None] | None = None) -> str:
    """The one line that a command refuses with."""
    done = subprocess.run(
        [sys.executable, "-m", "embtab", *argv],
        cwd=place.root,
        capture_output=True,
        text=True,
        preexec_fn=before,
        env=os.environ | place.environment,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("embtab: error: ")]
    assert len(line) < 600
    return line
