"""Every command that takes long, with small inputs."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import contents
import raws
import torch
import yaml
from chaos import Command, Place, run

from embtab.features import read_features
from embtab.training.checkpoint import read_checkpoint

MODEL = {"name": "AutoInt", "num_layers": 0, "dnn": [8]}


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
    shutil.copy(root / "trained/runs/fit/version_0/config.yaml", root / "config.yaml")
    run(place, ["export", str(root / "last.ckpt"), str(root / "old"), "--precision", "int8"])
    torch.manual_seed(0)
    torch.save({"a": torch.randn(60_000, 16), "b": torch.randn(200, 16)}, root / "dense.pt")
    return place


def fit(place: Place, out: Path) -> list[str]:
    """Goes on from the last checkpoint, where there is one that is not the end."""
    out.mkdir(exist_ok=True)
    argv = ["fit", "--config", str(place.root / "fit.yaml"), "--trainer.default_root_dir", str(out)]
    argv += ["--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"]
    argv += ["--trainer.logger.save_dir", str(out / "runs"), "--trainer.logger.name", "fit"]
    last = contents.last_of(out)
    if not last.exists():
        return argv
    if read_checkpoint(last)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 3:
        return ["plan", str(place.root / "data")]  # it was killed once all was done
    return [*argv, "--ckpt_path", str(last)]


def prepare(kind: str, make: Callable[[Place, Path], object]) -> Callable[[Place, Path], list[str]]:
    """Prepares a raw file or folder."""
    return lambda place, out: ["prepare", kind, place.made(kind, make), "--out", str(out), "--if-absent"]


def prepare_table(place: Place, out: Path) -> list[str]:
    """Prepares a folder of CSV files by the roles of their columns."""
    folder = place.made("table", raws.table)
    return ["prepare", "table", f"{folder}/files", "--roles", f"{folder}/roles.yaml", "--out", str(out), "--if-absent"]


def once(place: Place, out: Path, argv: list[str]) -> list[str]:
    """A command that refuses an output that is there: killed once all was done, it has nothing left to do."""
    return ["plan", str(place.root / "data")] if out.exists() else argv


def export_program(kind: str) -> Callable[[Place, Path], list[str]]:
    """Exports a whole ranker."""

    def argv(place: Place, out: Path) -> list[str]:
        config = str(place.root / "config.yaml")
        exported = ["export", str(place.root / "last.ckpt"), str(out), "--format", kind, "--config", config]
        return once(place, out, exported)

    return argv


def export_vectors(kind: str) -> Callable[[Place, Path], list[str]]:
    """Exports a vector per id from a bundle."""

    def argv(place: Place, out: Path) -> list[str]:
        return once(place, out, ["export", place.made("bundle", large_bundle), str(out), "--format", kind])

    return argv


def large_bundle(place: Place, out: Path) -> None:
    """Of tables that take a while to write."""
    torch.save({"a": torch.randn(300_000, 16), "b": torch.randn(200_000, 16)}, place.root / "made/large.pt")
    run(place, ["import", str(place.root / "made/large.pt"), "--out", str(out), "--method", "qr", "--budget", "0.5x"])


def export_delta(place: Place, out: Path) -> list[str]:
    """Exports what a later checkpoint changed."""
    later = place.made("later.ckpt", later_checkpoint)
    return once(place, out, ["export", later, str(out), "--since", str(place.root / "old")])


def later_checkpoint(place: Place, path: Path) -> None:
    """The last one, some rows of each table moved."""
    checkpoint = read_checkpoint(place.root / "last.ckpt")
    for name, value in checkpoint["state_dict"].items():
        if name.startswith("tables.lookup.") and value.dim() == 2:
            checkpoint["state_dict"][name] = torch.cat([value[:1] + 1, value[1:]])
    torch.save(checkpoint, path)


def import_ranker(place: Place, out: Path) -> list[str]:
    """Imports dense tables, and trains them a little under a ranker."""
    data, last = str(place.root / "data"), str(place.root / "last.ckpt")
    argv = ["import", place.made("tables.pt", dense_tables), "--out", str(out), "--overwrite", "--method", "qr"]
    argv += ["--budget", "0.5x", "--data", data, "--ranker", last, "--config", str(place.root / "config.yaml")]
    return [*argv, "--fine-tune", "2"]


def dense_tables(place: Place, path: Path) -> None:
    """A dense table of every feature of the dataset."""
    torch.manual_seed(0)
    torch.save({each.name: torch.randn(each.num_ids, 4) for each in read_features(place.root / "data")}, path)


def study(place: Place, out: Path) -> list[str]:
    """Compares sequence models."""
    return ["compare", "--config", place.made("study.yaml", described_study), "--out", str(out)]


def described_study(place: Place, path: Path) -> None:
    """Three short runs on generated histories."""
    data = str(path.with_name("histories"))
    generated = ["--generate", "--users", "300", "--length", "10", "--items", "100", "--interests", "8"]
    run(place, ["prepare", "sequences", *generated, "--out", data])
    dare = {"model": "DARE", "top_k": 5, "attention": {"dim": 4, "share": 0.3}}
    settings = {"task": "sequences", "data": data, "arms": {"mean": {"model": "MeanPool"}, "dare": dare}, "dim": 8}
    settings |= {"methods": ["qr"], "budgets": ["0.5x"], "seeds": [0, 1], "epochs": 2, "head": {"hidden": [8]}}
    path.write_text(yaml.safe_dump(settings))


PREPARE: Mapping[str, Command] = {
    "prepare": Command(
        lambda place, out: [
            *("prepare", "synthetic", "--rows", "200000", "--scale", "0.0005", "--out", str(out), "--if-absent"),
        ],
        contents.files,
    ),
    "prepare criteo": Command(prepare("criteo", raws.criteo), contents.files),
    "prepare movielens": Command(prepare("movielens", raws.movielens), contents.files),
    "prepare table": Command(prepare_table, contents.files),
    "prepare log": Command(
        lambda place, out: [
            *("prepare", "sequences", place.made("log.csv", raws.log), "--kind", "taobao"),
            *("--eval-negatives", "9", "--out", str(out), "--if-absent"),
        ],
        contents.files,
    ),
    "prepare histories": Command(
        lambda place, out: [
            *("prepare", "sequences", "--generate", "--users", "2000", "--length", "50"),
            *("--out", str(out), "--if-absent"),
        ],
        contents.files,
    ),
}
EXPORT: Mapping[str, Command] = {
    "export": Command(
        lambda place, out: ["export", str(place.root / "last.ckpt"), str(out), "--overwrite"],
        contents.bundle,
        contents.old_bundle_or_whole,
        lambda place, out: shutil.copytree(place.root / "old", out),
        room="200k",  # its former output is there, and is not what fills the disk
    ),
    "export beside": Command(
        lambda place, out: ["export", str(place.root / "last.ckpt"), str(out), "--overwrite", "--onnx"],
        contents.bundle,
    ),
    "export onnx": Command(export_program("onnx"), contents.program),
    # A compiler runs for half a minute.
    "export aoti": Command(export_program("aoti"), contents.program, kills=4, races=1),
    "export parquet": Command(export_vectors("parquet"), contents.files),
    "export hugectr": Command(export_vectors("hugectr"), contents.files),
    "export state dict": Command(export_vectors("state_dict"), contents.files),
    "export delta": Command(export_delta, contents.delta),
}
IMPORT: Mapping[str, Command] = {
    "import": Command(
        lambda place, out: [
            *("import", str(place.root / "dense.pt"), "--out", str(out), "--overwrite"),
            *("--method", "qr", "--budget", "0.3x"),
        ],
        contents.bundle,
    ),
    "import ranker": Command(import_ranker, contents.bundle),
}
RESUMED: Mapping[str, Command] = {
    "fit": Command(fit, contents.trained, contents.checkpoints_are_whole),
    "search": Command(
        lambda place, out: ["search", "--config", str(place.root / "search.yaml"), "--out", str(out)],
        contents.searched,
        contents.stages_are_whole,
    ),
    "compare": Command(
        lambda place, out: ["compare", "--config", str(place.root / "compare.yaml"), "--out", str(out)],
        contents.compared,
        contents.rows_are_whole,
        room="4k",
    ),
    "study": Command(study, contents.studied, contents.study_rows_are_whole, room="4k"),
}
COMMANDS = PREPARE | EXPORT | IMPORT | RESUMED
