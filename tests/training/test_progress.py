"""What a user sees while training, and the speed that is logged."""

import time

import lightning as L
import pytest

from embtab.models import AutoInt
from embtab.training.data import DataModule
from embtab.training.progress import Pace, Progress
from embtab.training.task import FitTask


def fit(toy, folder, progress, backend="fbgemm", **options):
    def model(num_dense, num_features, dim):
        return AutoInt(num_dense, num_features, dim, attention_dim=8, num_layers=1, dnn=())

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[progress],
        **{"log_every_n_steps": 6, **options},
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(FitTask(str(toy), dim=8, model=model, backend=backend), DataModule(str(toy), 128))
    return trainer


def test_a_terminal_gets_a_bar(toy, tmp_path, capsys):
    fit(toy, tmp_path, Progress(terminal=True))
    shown = capsys.readouterr()
    assert "epoch 0:" in shown.err
    assert "16/16" in shown.err
    assert "samples/s" in shown.err
    assert "validation:" in shown.err
    assert "\repoch 0  val/auc" in shown.err
    assert not shown.out.strip()


def test_a_file_gets_plain_lines(toy, tmp_path, capsys):
    trainer = fit(toy, tmp_path, Progress(terminal=False))
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[1] for line in lines[:2]] == ["batch 6/16", "batch 12/16"]
    assert lines[2].startswith("epoch 0  val/auc 0.")
    assert "\r" not in shown
    assert float(trainer.callback_metrics["train/samples_per_s"]) > 0


def test_accumulated_batches_show_their_loss_and_one_line_a_step(toy, tmp_path, capsys):
    fit(toy, tmp_path, Progress(terminal=False), backend="torch", accumulate_grad_batches=4, log_every_n_steps=1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert [line.split("  ")[1] for line in lines if "batch" in line] == [f"batch {i}/16" for i in (4, 8, 12, 16)]
    assert all(0.5 < float(line.split("  ")[2].removeprefix("loss ")) < 0.9 for line in lines if "batch" in line)


def test_other_ranks_are_silent(toy, tmp_path, capsys):
    progress = Progress(terminal=False)
    progress.disable()
    fit(toy, tmp_path, progress)
    assert "epoch 0" not in capsys.readouterr().err


def test_pauses_do_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace()
    pace.add(50)
    now[0] += 2
    assert pace.per_second == 25
    pace.pause()
    now[0] += 60
    assert pace.per_second == 25
    pace.resume()
    now[0] += 2
    pace.add(150)
    assert pace.per_second == pytest.approx(50)
