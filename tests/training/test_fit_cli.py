"""`embtab fit | validate | test | predict` from a configuration file to files on disk."""

import csv
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from embtab import cli
from embtab.errors import UserError
from embtab.files import held
from embtab.training import metrics
from embtab.training.task import FitTask

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


def test_what_a_killed_run_left_half_is_cleared_and_a_run_that_lives_is_refused(config, capsys):
    left, theirs = (Path(f"runs/fit/version_{run}/checkpoints/.last.ckpt.123.tmp") for run in (0, 1))
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
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(config, capsys, changes, says):
    assert main(["fit", "--config", config(**changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("embtab: error: ")
    assert len(line) < 300
    assert re.search(says, line)
    assert not Path("runs").exists()


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
