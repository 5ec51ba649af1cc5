"""Methods that reorganise themselves under the task: when they do, and that a resumed run does it as if not stopped."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from embtab.models import AutoInt
from embtab.training.checkpoint import load_tables
from embtab.training.data import DataModule
from embtab.training.task import FitTask

SMALL = partial(AutoInt, attention_dim=8, num_layers=1, dnn=(16,), dropout=0.2)
CCE = {"name": "cce", "chunks": 2}
CAFE = {"name": "cafe", "every": 5}
BOTH = {"item": CCE, "tags": CAFE}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def task(toy, method, **options) -> FitTask:
    L.seed_everything(1, verbose=False)
    return FitTask(str(toy), method, **{"budget": "0.7x", "dim": 8, "lr": 0.01, "model": SMALL, **options})


def trainer(folder, *callbacks, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = {"enable_checkpointing": bool(callbacks), "callbacks": list(callbacks)}
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **{"max_epochs": 3, **quiet, **saving, **options})


def recorded(learner: FitTask, monkeypatch) -> list[tuple[int, list[str]]]:
    """Steps at which tables were reorganised, and which, as they happen."""
    moments, adapt = [], learner.tables.adapt

    def spy(step, epoch=None):
        found = adapt(step, epoch)
        moments.extend([(step, found)] if found else [])
        return found

    monkeypatch.setattr(learner.tables, "adapt", spy)
    return moments


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (CCE, [16, 32]),  # after an epoch of 16 batches, but not after the last
        ({**CCE, "clusterings": 1}, [16]),
        ({**CCE, "every": 6, "clusterings": 3}, [6, 12, 18]),
        ({"name": "cafe", "every": 16}, [16, 32]),
    ],
)
def test_moments(toy, tmp_path, monkeypatch, method, steps):
    learner = task(toy, method)
    moments = recorded(learner, monkeypatch)
    trainer(tmp_path, limit_val_batches=0).fit(learner, DataModule(str(toy), 128))
    assert moments == [(step, ["item", "tags"]) for step in steps]


@pytest.mark.parametrize(
    ("cut", "method"),
    [
        (7, BOTH),  # within an epoch
        (16, BOTH),  # at its end
        (23, BOTH),  # within the next
        (20, {"item": {**CCE, "every": 10}, "tags": CAFE}),  # just before both are due
    ],
)
def test_resumes_exactly(toy, tmp_path, cut, method):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=cut, save_top_k=-1)
    whole, resumed = task(toy, method), task(toy, method)
    trainer(tmp_path, saver).fit(whole, DataModule(str(toy), 128))
    trainer(tmp_path).fit(
        resumed, DataModule(str(toy), 128), ckpt_path=tmp_path / f"step={cut}.ckpt", weights_only=True
    )
    left, right = whole.state_dict(), resumed.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_resumes_exactly_from_the_end_of_an_epoch(toy, tmp_path, monkeypatch, on_train_epoch_end):
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end, every_n_epochs=1
    )
    whole, resumed = task(toy, BOTH), task(toy, BOTH)
    trainer(tmp_path, saver).fit(whole, DataModule(str(toy), 128))
    moments = recorded(resumed, monkeypatch)
    trainer(tmp_path).fit(resumed, DataModule(str(toy), 128), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert [step for step, spaces in moments if "item" in spaces] == [16, 32]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_was_learnt_is_in_the_checkpoint(toy, tmp_path):
    learner, data = task(toy, BOTH), DataModule(str(toy), 128)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(learner, data)
    run.save_checkpoint(tmp_path / "made.ckpt")
    batch = next(iter(data.val_dataloader()))
    tables = load_tables(tmp_path / "made.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(tables(batch.sparse).values(), learner.tables.eval()(batch.sparse).values())
    arrays = [name for name in learner.state_dict() if ".slots" in name or ".pointers" in name]
    initial = task(toy, BOTH).state_dict()
    assert len(arrays) == 2
    assert not any(torch.equal(learner.state_dict()[name], initial[name]) for name in arrays)


def test_evaluation_counts_nothing(toy, tmp_path):
    learner = task(toy, CAFE)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    trainer(tmp_path).validate(learner, DataModule(str(toy), 128), verbose=False)
    assert any(name.endswith("sketch.training") for name in before)
    assert all(torch.equal(value, learner.state_dict()[name]) for name, value in before.items())


def test_accumulated_batches_are_one_step(toy, tmp_path, monkeypatch):
    learner = task(toy, BOTH, backend="torch")
    asked, adapt = [], learner.tables.adapt
    monkeypatch.setattr(
        learner.tables, "adapt", lambda step, epoch=None: (asked.append((step, epoch)), adapt(step, epoch))
    )
    run = trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2)
    run.fit(learner, DataModule(str(toy), 128))  # 16 batches an epoch: 6 steps, the last one of a single batch
    assert asked == [(step, 1 if step == 6 else None) for step in range(12)]
