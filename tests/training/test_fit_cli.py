"""`embtab fit | validate | test | predict` from a configuration file to files on disk."""

import csv
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from toy import write_toy

from embtab import cli
from embtab.errors import UserError
from embtab.files import held
from embtab.training import metrics
from embtab.training.task import FitTask

CHECKPOINT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
AUTOINT = ["--model.model", "embtab.models.AutoInt"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(toy, tmp_path, monkeypatch):
    """Writes a configuration with changes and returns its path; runs go below the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> str:
        model = {"class_path": "embtab.models.AutoInt", "init_args": {"attention_dim": 8, "num_layers": 1, "dnn": [16]}}
        described = {
            "data": {"path": str(toy), "batch_size": 128},
            "model": {"method": "qr", "budget": "0.9x", "dim": 8, "table_lr": 0.2, "lr": 0.01, "model": model},
            "trainer": {"max_epochs": 2, "log_every_n_steps": 5, "accelerator": "cpu"},
        }
        for key, value in changes.items():
            *path, last = key.split("__")
            part = described
            for name in path:
                part = part[name]
            part[last] = value
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(described))
        return str(tmp_path / "config.yaml")

    return write


def main(argv: list[str]) -> int:
    """The exit code of `embtab ...`."""
    try:
        cli.main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


def final(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_from_fit_to_predictions(config, toy, capsys):
    path = config()
    assert main(["fit", "--config", path]) == 0
    shown = capsys.readouterr().err
    assert "total" in shown  # the plan
    assert "batch 5/16" in shown
    assert "samples/s" in shown
    assert "val/auc" in shown
    run = Path("runs/fit/version_0")
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    speeds = [float(row["train/samples_per_s"]) for row in rows if row["train/samples_per_s"]]
    assert losses[-1] < losses[0]
    assert len(speeds) == 2
    assert min(speeds) > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["budget"] == "0.9x"
    (best,) = (run / "checkpoints").glob("best-*.ckpt")

    assert main(["validate", "--config", path, "--ckpt_path", str(best)]) == 0
    assert main(["test", "--config", path, "--ckpt_path", str(best)]) == 0
    assert main(["predict", "--config", path, "--ckpt_path", str(best)]) == 0
    with Path("runs/fit/version_2/metrics.csv").open() as file:
        tested = {name: float(value) for name, value in next(csv.DictReader(file)).items()}
    assert tested["test/auc"] > 0.75
    labels = pq.read_table(toy / "test")["label"].to_numpy()
    predicted = pq.read_table("runs/fit/version_3/predictions.parquet")["probability"].to_numpy()
    assert metrics.auc(labels, predicted) == pytest.approx(tested["test/auc"], abs=1e-6)


def test_a_run_that_broke_off_ends_where_a_whole_one_does(config, monkeypatch):
    path = config(save_every=7)
    assert main(["fit", "--config", path]) == 0
    step = FitTask.training_step

    def breaks(task, batch, batch_idx):
        if task.global_step == 9:
            raise UserError("power cut")
        return step(task, batch, batch_idx)

    monkeypatch.setattr(FitTask, "training_step", breaks)
    assert main(["fit", "--config", path]) == 2
    monkeypatch.undo()
    stopped = str(Path(path).parent / "runs/fit/version_1/checkpoints/last.ckpt")
    assert torch.load(stopped, weights_only=True)["global_step"] == 7
    monkeypatch.chdir(Path(path).parent)
    assert main(["fit", "--config", path, "--ckpt_path", stopped]) == 0
    whole, resumed = (final(f"runs/fit/version_{run}/checkpoints/last.ckpt") for run in (0, 2))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_goes_on_keeps_the_best_checkpoint_so_far(config):
    path = config(trainer__max_epochs=1)
    assert main(["fit", "--config", path]) == 0
    (best,) = Path("runs/fit/version_0/checkpoints").glob("best-*.ckpt")
    ruined = ["--ckpt_path", "runs/fit/version_0/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    assert main(["fit", "--config", path, *ruined, "--model.table_lr", "1e4"]) == 0
    (kept,) = Path("runs/fit/version_1/checkpoints").glob("best-*.ckpt")
    assert kept.name == best.name
    assert kept.read_bytes() == best.read_bytes()


@pytest.mark.parametrize("which", ["passwd", "link", "remote", "above"])
def test_a_checkpoint_that_names_other_files_neither_copies_nor_removes_them(config, which):
    """Lightning copies and removes what a checkpoint calls its earlier ones; only those beside it are."""
    path = config(trainer__max_epochs=1)
    assert main(["fit", "--config", path]) == 0
    here, folder = Path.cwd(), Path("runs/fit/version_0/checkpoints")
    (here / "victim").mkdir()
    (here / "victim" / "precious").write_text("precious")
    (folder / "link.ckpt").symlink_to(here / "victim" / "precious")
    target = {
        "passwd": "/etc/passwd",
        "link": str((folder / "link.ckpt").absolute()),
        "remote": f"local://{here}/victim",
        "above": "runs/fit/version_1/checkpoints/../../../../victim",
    }[which]
    content = torch.load(folder / "last.ckpt", weights_only=True)
    states = [state for state in content["callbacks"].values() if "best_model_path" in state]
    assert len(states) == 2
    for state in states:
        mine = str((here / "runs/fit/version_1/checkpoints").absolute())
        state |= {"best_model_path": target, "kth_best_model_path": target, "last_model_path": target}
        state |= {"best_k_models": {target: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
        state["dirpath"] = mine if which in ("remote", "above") else "elsewhere"
    torch.save(content, folder / "last.ckpt")
    more = ["--ckpt_path", str(folder / "last.ckpt"), "--trainer.max_epochs", "3"]
    assert main(["fit", "--config", path, *more]) == 0
    assert (here / "victim" / "precious").read_text() == "precious"
    names = [each.name for each in Path("runs/fit/version_1/checkpoints").iterdir()]
    assert len(names) == 2
    assert "last.ckpt" in names
    assert any(name.startswith("best-step") for name in names)


def test_what_a_killed_run_left_half_is_cleared_and_a_run_that_lives_is_refused(config, capsys):
    left, theirs = (Path(f"runs/fit/version_{run}/checkpoints/.last.ckpt.123.0123456789abcdef.tmp") for run in (0, 1))
    for path in (left, theirs):
        path.parent.mkdir(parents=True)
        path.touch()
    with held(theirs, wait=False):
        assert main(["fit", "--config", config(trainer__max_steps=1)]) == 0
    assert not left.exists()
    assert theirs.exists()
    with held(Path("runs/fit/version_2"), wait=False):
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
        logger["init_args"] = {"save_dir": "runs", "name": "fit", "version": 2}
        assert main(["fit", "--config", config(trainer__logger=logger)]) == 2
    assert "version_2: another run writes here" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_run_with_nothing_left_to_train_says_so_and_writes_nothing(config, capsys, limit):
    path = config(trainer__max_epochs=1, trainer__max_steps=5 if limit == "max_steps" else -1)
    assert main(["fit", "--config", path]) == 0
    last = "runs/fit/version_0/checkpoints/last.ckpt"
    more = ["--trainer.max_epochs", "9"] if limit == "max_steps" else []
    assert main(["fit", "--config", path, "--ckpt_path", last, *more]) == 2
    assert f"nothing is left to train, {limit} is" in capsys.readouterr().err
    assert not Path("runs/fit/version_1").exists()


def test_the_same_seed_gives_the_same_run(config):
    path = config(trainer__max_epochs=1)
    assert main(["fit", "--config", path]) == 0
    assert main(["fit", "--config", path]) == 0
    assert main(["fit", "--config", path, "--seed_everything", "1"]) == 0
    first, second, other = (final(f"runs/fit/version_{run}/checkpoints/last.ckpt") for run in range(3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__buget": "8MB"}, "model.buget"),
        ({"model__budget": "8 apples"}, "8 apples"),
        ({"model__budget": 10}, "at least|smallest"),
        ({"model__method": "qrr"}, "unknown method 'qrr'"),
        ({"model__backend": "cuda"}, "unknown lookup backend 'cuda'"),
        ({"model__table_optimizer": "adam"}, "table optimizer"),
        ({"model__model__init_args__num_layer": 2}, "num_layer"),
        ({"model__model__init_args__num_layers": "two"}, "num_layers.*two"),
        ({"model__model__class_path": "embtab.models.AutoIn"}, "AutoIn"),
        ({"data__path": "nowhere"}, "nowhere: not a prepared dataset"),
        ({"data__batch_size": 0}, "batch_size"),
        ({"trainer__max_epochs": "many"}, "max_epochs.*many"),
        ({"trainer__accelerator": "abacus"}, "abacus"),
        ({"trainr": {"max_epochs": 1}}, "trainr"),
        ({"model__lr": -1}, "lr must be a number from 0 on, got -1"),
        ({"data__seed": -1}, "seed must be 0 or more, got -1"),
        ({"seed_everything": -1}, "-1 is not in bounds"),
        ({"trainer__logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}, "wandb.*install the package"),
        ({"trainer__callbacks": [CHECKPOINT | {"init_args": {"save_top_k": 3}}]}, "save_top_k=3, monitor=None"),
        ({"trainer__callbacks": [CHECKPOINT, CHECKPOINT]}, "more than one stateful callback"),
        ({"trainer__strategy": "dpp"}, "dpp"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(config, capsys, changes, says):
    assert main(["fit", "--config", config(**changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("embtab: error: ")
    assert len(line) < 300
    assert re.search(says, line)
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Path:
    """A run of one step, whose checkpoints are last.ckpt and weights.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ["fit", "--data.path", str(toy), "--model.dim", "8", "--trainer.accelerator", "cpu"]
    short = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    logger = ["--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"]
    where = [*logger, "--trainer.logger.init_args.save_dir", str(folder)]
    weights = CHECKPOINT | {"init_args": {"dirpath": str(folder), "filename": "weights", "save_weights_only": True}}
    assert main([*argv, *short, *where, f"--trainer.callbacks={json.dumps([weights])}"]) == 0
    (last,) = folder.glob("*/*/checkpoints/last.ckpt")
    last.rename(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1  # one batch, and not all of them
    return folder


@pytest.mark.parametrize(
    ("command", "checkpoint", "changes", "says"),
    [
        ("fit", "weights", [], "holds weights alone"),
        ("fit", "last", ["--model.table_optimizer", "sgd"], "trained by 'rowwise_adagrad' and these are by 'sgd'"),
        ("fit", "last", ["--model.table_optimizer", "adagrad"], "does not fit this configuration: .*optimizer"),
        ("fit", "last", ["--model.backend", "torch"], "another optimizer, backend"),
        ("test", "last", [*AUTOINT, "--model.model.dnn", "[7]"], "not fit .*model.dnn"),
        ("fit", "last", [*AUTOINT, "--model.model.num_layers", "2"], "not fit .*model.attention"),
        ("fit", "last", ["--data.path", "OTHER"], "trained on other data"),
        ("validate", "last", ["--data.path", "OTHER"], "trained on other data"),
        ("test", "last", ["--data.path", "OTHER"], "trained on other data"),
        ("predict", "last", ["--data.path", "OTHER"], "trained on other data.*--other_data true"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_line(trained, other, toy, capsys, command, checkpoint, changes, says):
    argv = ["--data.path", str(toy), "--model.dim", "8", "--trainer.accelerator", "cpu"]
    argv += [str(other) if word == "OTHER" else word for word in changes]
    argv += ["--ckpt_path", str(trained / f"{checkpoint}.ckpt")]
    assert main([command, *argv, *(["--trainer.max_epochs", "3"] if command == "fit" else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embtab: error: ")]
    assert re.search(says, line)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same features and numbers of ids, other rows."""
    folder = write_toy(tmp_path_factory.mktemp("other") / "data", rows={"train": 300, "valid": 50, "test": 60})
    (folder / "vocab").mkdir()
    return folder


def test_data_whose_ids_mean_the_same_is_taken_where_the_user_says_so(trained, other, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    last = str(trained / "last.ckpt")
    argv = ["--data.path", str(other), "--model.dim", "8", "--trainer.accelerator", "cpu", "--ckpt_path", last]
    assert main(["predict", *argv, "--other_data", "true", "--split", "valid"]) == 0
    assert len(pq.read_table("runs/fit/version_0/predictions.parquet")) == 50
    assert main(["export", last, "bundle", "--vocab", str(other)]) == 2
    assert "trained on other data" in capsys.readouterr().err


def test_own_checkpoints_stand_beside_ours(config):
    assert main(["fit", "--config", config(trainer__callbacks=[CHECKPOINT], trainer__max_steps=1)]) == 0
    assert len(list(Path("runs/fit/version_0/checkpoints").glob("*.ckpt"))) == 2  # last and theirs


def test_no_file_of_the_user_is_written_over(config, capsys):
    path = Path(config(trainer__logger=False, trainer__max_steps=1))
    before = path.read_text()
    assert main(["fit", "--config", str(path)]) == 0
    assert path.read_text() == before
    here = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": ".", "name": "", "version": ""},
    }
    path = Path(config(trainer__logger=here, trainer__max_steps=1))
    before = path.read_text()
    assert main(["fit", "--config", str(path)]) == 0
    assert path.read_text() == before


def test_a_dry_run_has_no_folder(config, capsys):
    assert main(["fit", "--config", config(trainer__fast_dev_run=True)]) == 0
    assert "run:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
        (["fit", "--config", "CONFIG", "--ckpt_path", "absent.ckpt"], "absent.ckpt: no such checkpoint"),
        (["fit", "--config", "CONFIG", "--ckpt_path", "CONFIG"], "damaged, or not a checkpoint"),
        (["test", "--config", "CONFIG"], "needs a trained model"),
        (["fit", "--config", "CONFIG", "--model.nonsense", "1"], "nonsense"),
        (["fit"], "data.path"),
    ],
)
def test_a_wrong_command_line_is_one_line(config, capsys, argv, says):
    path = config()
    assert main([path if word == "CONFIG" else word for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["fit_synthetic", "fit_criteo", "fit_frappe", "fit_long"])
def test_the_configurations_that_come_along_run(name, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.path", str(toy), "--trainer.accelerator", "cpu"]
    assert main([*argv, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0
    assert list(tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt"))
