"""What is in a complete output, without what no two runs share: dates, times, and digests over them."""

import json
from pathlib import Path

import torch
from chaos import Content

from embtab.compare.results import TIMES, read_results
from embtab.sequences import run as studies
from embtab.serving.program import Program
from embtab.training.checkpoint import read_checkpoint


def files(folder: Path) -> Content:
    """The bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bundle(folder: Path) -> Content:
    """A bundle but for its date, which its own digest and the model card hold too."""
    found = files(folder)
    about = json.loads(found.pop("config.json"))
    del found["README.md"], about["created"], about["sha256"], about["files"]["README.md"]
    return found | {"config.json": about}


def delta(folder: Path) -> Content:
    """A delta but for its date."""
    found = files(folder)
    about = json.loads(found.pop("config.json"))
    del about["created"], about["sha256"]
    return found | {"config.json": about}


def program(folder: Path) -> Content:
    """The golden outputs of a program, which it gives when it is run, and all that is said of it but for its date and
    that of the bundle it was made from; what compilers make differs from run to run.
    """
    worst, fine = Program(folder).difference()
    assert fine, worst
    found = files(folder)
    about = json.loads(found["config.json"])
    del about["created"], about["sha256"], about["provenance"]["bundle"]
    assert about.pop("files").keys() == found.keys() - {"config.json"}
    return {"names": sorted(found), "golden": found["golden.safetensors"], "config.json": about}


def compared(folder: Path) -> Content:
    """The results of a sweep but for its times, and the names of the report's files."""
    rows = read_results(folder / "results.csv").values()
    assert {row["status"] for row in rows} == {"ok"}
    named = {f"{row['method']} {row['seed']}": {k: v for k, v in row.items() if k not in TIMES} for row in rows}
    report = {str(path.relative_to(folder)): "" for path in folder.rglob("*.*") if path.parent.name != "searches"}
    return named | {name: "" for name in report if not name.startswith("searches")}


def studied(folder: Path) -> Content:
    """The results of a study of sequence models but for its times, and the names of the report's files."""
    rows = studies.read_results(folder / "results.csv").values()
    assert {row["status"] for row in rows} == {"ok"}
    named = {f"{row['arm']} {row['seed']}": {k: v for k, v in row.items() if k != "seconds"} for row in rows}
    return named | dict.fromkeys(files(folder), "")


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


def old_bundle_or_whole(out: Path, expected: Content) -> None:
    """A bundle is replaced in one step."""
    assert bundle(out) in (bundle(out.parent.parent / "old"), expected)


def rows_are_whole(out: Path, expected: Content) -> None:
    """Rows of a sweep are there or not."""
    rows = read_results(out / "results.csv").values()
    assert all(row["status"] == "ok" for row in rows)


def study_rows_are_whole(out: Path, expected: Content) -> None:
    """Rows of a study are there or not."""
    rows = studies.read_results(out / "results.csv").values()
    assert all(row["status"] == "ok" for row in rows)


def stages_are_whole(out: Path, expected: Content) -> None:
    """What a search goes on from can be read."""
    for path in out.glob("*/*.pt"):
        torch.load(path, weights_only=True)


def checkpoints_are_whole(out: Path, expected: Content) -> None:
    """All checkpoints can be read."""
    for path in out.glob("runs/fit/version_*/checkpoints/*.ckpt"):
        read_checkpoint(path)["state_dict"]
