"""Commands of embtab in processes that are killed, starved of disk, or raced against each other.

A command that is to be killed is forked from a process that has imported everything, so that a kill at a random moment
hits its work and not three seconds of imports; what runs is `embtab.cli.main` all the same.
"""

import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml

from embtab.compare.results import TIMES, read_results
from embtab.training.checkpoint import read_checkpoint

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("embtab.training.cli", "embtab.compare.run", "embtab.compare.train", "embtab.compare.searched"),
        *(
            "embtab.learned.grid",
            "embtab.datasets.synthetic",
            "embtab.bundle",
            "embtab.importing",
            "embtab.commands.plan",
        ),
    ]
)
MODEL = {"name": "AutoInt", "num_layers": 0, "dnn": [8]}
Content = dict[str, object]


@dataclass(frozen=True)
class Place:
    """What all commands of a test share: a prepared dataset, configurations, a checkpoint, dense tables, a bundle."""

    root: Path

    @property
    def temporary(self) -> Path:
        """The folder of temporary files of every command here."""
        return self.root / "temporary"


@dataclass(frozen=True)
class Command:
    """A command, and how its output is judged.

    Attributes:
        argv: of a run into a folder, which may hold what an earlier run left.
        content: of a complete output, without what no two runs share; raises when it is not complete.
        sound: checks what a kill left.
        before: makes what is there before the first run.
    """

    argv: Callable[[Place, Path], list[str]]
    content: Callable[[Path], Content]
    sound: Callable[[Path, Content], None]
    before: Callable[[Place, Path], None] = lambda place, out: None


def prepared(root: Path) -> Place:
    """Makes the shared files."""
    place = Place(root)
    place.temporary.mkdir()
    run(place, ["prepare", "synthetic", "--rows", "5000", "--scale", "0.0005", "--out", str(root / "data")])
    sweep = {"data": str(root / "data"), "budgets": ["0.3x"], "seeds": [0], "dim": 4, "model": MODEL, "batch_size": 512}
    magnitude = {"name": "magnitude", "epochs": 1, "every": 3}
    compared = sweep | {"methods": ["dense", "hash", "qr", magnitude], "epochs": 2}
    searched = sweep | {"methods": [magnitude, {"name": "optembed", "epochs": 1, "generations": 1}], "epochs": 2}
    trained = {
        "data": {"path": str(root / "data"), "batch_size": 128},
        "model": {
            "method": "qr",
            "budget": "0.5x",
            "dim": 4,
            "model": {"class_path": "embtab.models.AutoInt", "init_args": {"num_layers": 0, "dnn": [8]}},
        },
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
        "save_every": 5,
    }
    for name, settings in {"compare": compared, "search": searched, "fit": trained}.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    (root / "trained").mkdir()
    run(place, fit(place, root / "trained"), root / "trained")
    shutil.copy(root / "trained/runs/fit/version_0/checkpoints/last.ckpt", root / "last.ckpt")
    run(place, ["export", str(root / "last.ckpt"), str(root / "old"), "--precision", "int8"])
    torch.manual_seed(0)
    torch.save({"a": torch.randn(60_000, 16), "b": torch.randn(200, 16)}, root / "dense.pt")
    return place


def start(place: Place, argv: list[str], folder: Path) -> BaseProcess:
    """Starts a command in a folder, from a process that has imported what it needs."""
    process = FORKS.Process(target=_main, args=(argv, folder, place.temporary))
    process.start()
    return process


def _main(argv: list[str], folder: Path, temporary: Path) -> None:
    """Becomes the command."""
    from embtab import cli

    os.chdir(folder)
    tempfile.tempdir = str(temporary)
    with (folder / "said.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(90, exit=True)  # a run that hangs says where
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
            command.sound(out, expected)
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
    left = [str(path) for path in [*folder.rglob(".*"), *place.temporary.iterdir()] if path.name != ".lock"]
    assert left == [], left


def said_of(
    argv: list[str], folder: Path, temporary: Path, before: Callable[[], None] | None = None, **environment: str
) -> str:
    """The one line that a command refuses with."""
    done = subprocess.run(
        [sys.executable, "-m", "embtab", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=before,
        env=os.environ | {"TMPDIR": str(temporary)} | environment,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("embtab: error: ")]
    assert len(line) < 600
    return line


def files(folder: Path) -> Content:
    """The bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without(text: bytes | str, names: tuple[str, ...]) -> object:
    """JSON without some entries."""
    return {name: value for name, value in json.loads(text).items() if name not in names}


def bundle(folder: Path) -> Content:
    """A bundle but for its date, which its own digest and the model card hold too."""
    found = files(folder)
    about = json.loads(found.pop("config.json"))
    del found["README.md"], about["created"], about["sha256"], about["files"]["README.md"]
    return found | {"config.json": about}


def compared(folder: Path) -> Content:
    """The results of a sweep but for its times, and the names of the report's files."""
    rows = read_results(folder / "results.csv").values()
    assert {row["status"] for row in rows} == {"ok"}
    named = {f"{row['method']} {row['seed']}": {k: v for k, v in row.items() if k not in TIMES} for row in rows}
    report = {str(path.relative_to(folder)): "" for path in folder.rglob("*.*") if path.parent.name != "searches"}
    return named | {name: "" for name in report if not name.startswith("searches")}


def searched(folder: Path) -> Content:
    """What searches found, without what it cost."""
    (rows, _) = (folder / "results.csv").read_text(), (folder / "report.md").read_text()
    found: Content = {"rows": rows.count("\n")}
    for path in sorted(folder.rglob("*")):
        if path.name in ("result.json", "plan.json", "archive.csv", "masks.safetensors"):
            found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "bundle":
            found |= {f"{path.relative_to(folder)}/{name}": each for name, each in bundle(path).items()}
    return found


def trained(folder: Path) -> Content:
    """The weights of the last checkpoint and of the best one, and how far they had come."""
    found: Content = {}
    for path in last_of(folder).parent.glob("*.ckpt"):
        checkpoint = read_checkpoint(path)
        found |= {f"{path.name} {name}": value.tolist() for name, value in checkpoint["state_dict"].items()}
        found |= {f"{path.name} {name}": checkpoint[name] for name in ("global_step", "epoch")}
    return found


def last_of(folder: Path) -> Path:
    """The last checkpoint of the newest run that has one."""
    found = folder.glob("runs/fit/version_*/checkpoints/last.ckpt")
    return max(found, key=lambda path: int(path.parts[-3].removeprefix("version_")), default=folder / "none")


def fit(place: Place, out: Path) -> list[str]:
    """Goes on from the last checkpoint, where there is one that is not the end."""
    out.mkdir(exist_ok=True)
    argv = ["fit", "--config", str(place.root / "fit.yaml"), "--trainer.default_root_dir", str(out)]
    argv += ["--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"]
    argv += ["--trainer.logger.save_dir", str(out / "runs"), "--trainer.logger.name", "fit"]
    last = last_of(out)
    if not last.exists():
        return argv
    if read_checkpoint(last)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 3:
        return ["plan", str(place.root / "data")]  # it was killed once all was done
    return [*argv, "--ckpt_path", str(last)]


def _absent_or_whole(content: Callable[[Path], Content]) -> Callable[[Path, Content], None]:
    def sound(out: Path, expected: Content) -> None:
        assert not out.exists() or content(out) == expected

    return sound


def _old_or_whole(out: Path, expected: Content) -> None:
    assert bundle(out) in (bundle(out.parent.parent / "old"), expected)


def _rows_are_whole(out: Path, expected: Content) -> None:
    rows = read_results(out / "results.csv").values()
    assert all(row["status"] == "ok" for row in rows)


def _stages_are_whole(out: Path, expected: Content) -> None:
    for path in out.glob("*/*.pt"):
        torch.load(path, weights_only=True)


def _checkpoints_are_whole(out: Path, expected: Content) -> None:
    for path in out.glob("runs/fit/version_*/checkpoints/*.ckpt"):
        read_checkpoint(path)["state_dict"]


COMMANDS: Mapping[str, Command] = {
    "prepare": Command(
        lambda place, out: [
            *("prepare", "synthetic", "--rows", "200000", "--scale", "0.0005", "--out", str(out), "--if-absent"),
        ],
        files,
        _absent_or_whole(files),
    ),
    "fit": Command(fit, trained, _checkpoints_are_whole),
    "search": Command(
        lambda place, out: ["search", "--config", str(place.root / "search.yaml"), "--out", str(out)],
        searched,
        _stages_are_whole,
    ),
    "compare": Command(
        lambda place, out: ["compare", "--config", str(place.root / "compare.yaml"), "--out", str(out)],
        compared,
        _rows_are_whole,
    ),
    "export": Command(
        lambda place, out: ["export", str(place.root / "last.ckpt"), str(out), "--overwrite"],
        bundle,
        _old_or_whole,
        lambda place, out: shutil.copytree(place.root / "old", out) and None,
    ),
    "import": Command(
        lambda place, out: [
            *("import", str(place.root / "dense.pt"), "--out", str(out), "--overwrite"),
            *("--method", "qr", "--budget", "0.3x"),
        ],
        bundle,
        _absent_or_whole(bundle),
    ),
}
