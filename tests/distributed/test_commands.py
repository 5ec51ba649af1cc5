"""Each training command on two processes, to its end: it writes what one process writes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sharded import free_port
from toy import write_toy

from embtab.models import AutoInt
from embtab.training.checkpoint import WholeFiles, read_checkpoint
from embtab.training.data import DataModule
from embtab.training.task import FitTask

pytestmark = pytest.mark.distributed
ROWS = {"train": 600, "valid": 201, "test": 301}  # odd: the last row of a split belongs to one process alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_toy(folder / "data", rows=ROWS)
    model = {"class_path": "embtab.models.AutoInt", "init_args": {"attention_dim": 8, "num_layers": 1, "dnn": [16]}}
    described = {
        "data": {"path": "data", "batch_size": 50},
        "model": {"dim": 8, "table_lr": 0.2, "lr": 0.01, "init_std": 0.3, "precision": "int4", "model": model},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (folder / "two.yaml").write_text(yaml.safe_dump(described))
    return folder


def embtab(folder: Path, *argv: str, processes: int = 2) -> str:
    """What a command writes to stderr, on processes that are started as torchrun starts them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    together = {**os.environ, "OMP_NUM_THREADS": "1", **(address | size if processes > 1 else {})}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "embtab", *argv],
            cwd=folder,
            env={**together, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, said
    return "".join(said)


@pytest.fixture(scope="module")
def trained(folder) -> str:
    """The checkpoint of two processes."""
    said = embtab(folder, "fit", "--config", "two.yaml")
    assert said.count("run: runs/fit/version_0") == 1
    assert said.count("total") == 1  # the plan, said once
    return "runs/fit/version_0/checkpoints/last.ckpt"


def alone(folder: Path, batch_size: int = 50) -> tuple[FitTask, DataModule, L.Trainer]:
    """The run of two.yaml in this process."""
    torch.manual_seed(0)
    settings = yaml.safe_load((folder / "two.yaml").read_text())["model"]
    model = partial(AutoInt, **settings.pop("model")["init_args"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, plugins=[WholeFiles()], **quiet)
    L.seed_everything(0, verbose=False)
    return FitTask(str(folder / "data"), model=model, **settings), DataModule(folder / "data", batch_size), trainer


def test_fit_spreads_the_tables_by_itself_and_trains_as_one_process(folder, trained):
    task, data, trainer = alone(folder, batch_size=100)
    trainer.fit(task, data)
    one, two = task.state_dict(), read_checkpoint(folder / trained)["state_dict"]
    assert one.keys() - {"tables._extra_state"} == two.keys()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, atol=1e-5, rtol=1e-4)


def test_processes_that_lightning_starts(folder):
    given = ["--trainer.devices", "2", "--trainer.strategy", "embtab.TorchRecStrategy", "--trainer.max_steps", "1"]
    assert embtab(folder, "fit", "--config", "two.yaml", *given, processes=1).count("run: ") == 1


@pytest.mark.parametrize("command", ["validate", "test"])
def test_every_row_is_measured_once(folder, trained, command):
    logger = ["--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"]
    named = [*logger, "--trainer.logger.init_args.save_dir", command]
    embtab(folder, command, "--config", "two.yaml", "--ckpt_path", trained, *named)
    (path,) = (folder / command).glob("*/*/metrics.csv")
    names, values = (line.split(",") for line in path.read_text().splitlines())
    two = {name: float(value) for name, value in zip(names, values, strict=True) if "/" in name}
    task, data, trainer = alone(folder)
    (one,) = getattr(trainer, command)(task, data, ckpt_path=folder / trained, weights_only=True, verbose=False)
    assert two == pytest.approx(one, rel=1e-5)


def test_predict_and_export(folder, trained):
    said = embtab(folder, "predict", "--config", "two.yaml", "--ckpt_path", trained, "--split", "test")
    (path,) = [line.removeprefix("predictions: ") for line in said.splitlines() if line.startswith("predictions:")]
    written, raw = pq.read_table(folder / path), pq.read_table(folder / "data" / "test")
    assert written.column_names == ["row", "who", "probability"]
    assert written["row"].to_pylist() == list(range(ROWS["test"]))
    assert written["who"].to_pylist() == raw["who"].to_pylist()
    task, data, trainer = alone(folder)
    one = torch.cat(trainer.predict(task, data, ckpt_path=folder / trained, weights_only=True))
    np.testing.assert_allclose(one, written["probability"].to_numpy(), rtol=1e-5)
    embtab(folder, "export", trained, "bundle", processes=1)
