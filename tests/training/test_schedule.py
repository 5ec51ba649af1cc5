"""One schedule for ranker and tables in a Trainer: the steps that a plain torch loop makes, and resumed exactly."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from embtab.errors import UserError
from embtab.models import AutoInt
from embtab.training.data import DataModule
from embtab.training.schedule import Schedule
from embtab.training.task import FitTask

BATCH, STEPS = 125, 32  # of two epochs
LR, TABLE_LR = 0.02, 0.1
SCHEDULES = {
    "warm-up": Schedule(warmup_steps=5),
    "cosine": Schedule("cosine", warmup_steps=4, floor=0.1),
    "linear": Schedule("linear"),
    "step": Schedule("step", every=6, gamma=0.5),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_backend = pytest.mark.parametrize("backend", ["fbgemm", "native"])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def task(toy, **options) -> FitTask:
    L.seed_everything(1, verbose=False)
    model = partial(AutoInt, attention_dim=8, num_layers=1, dnn=(16,), dropout=0.0)
    return FitTask(str(toy), **{"dim": 6, "lr": LR, "table_lr": TABLE_LR, "model": model, **options})


def trainer(folder, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"max_epochs": 2, "enable_checkpointing": False, "limit_val_batches": 0, **quiet, **options}
    return L.Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **options)


class Rates(L.Callback):
    """The learning rates of every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@every_backend
@every_schedule
def test_a_trainer_makes_the_steps_of_a_plain_loop(toy, tmp_path, schedule, backend) -> None:
    learner = task(toy, schedule=schedule, backend=backend, table_optimizer="sgd")
    rates = Rates()
    trainer(tmp_path, callbacks=[rates]).fit(learner, DataModule(str(toy), BATCH))
    factors = [schedule.factor(step, STEPS) for step in range(STEPS)]
    assert rates.seen == [pytest.approx([LR * factor, TABLE_LR * factor]) for factor in factors]

    plain = task(toy, backend="torch")
    fresh = task(toy, backend=backend)
    plain.tables.load_state_dict(fresh.tables.state_dict())
    plain.model.load_state_dict(fresh.model.state_dict())
    adam = torch.optim.Adam(plain.model.parameters(), LR)
    sgd = torch.optim.SGD(plain.tables.parameters(), TABLE_LR)
    loader = DataModule(str(toy), BATCH).train_dataloader()
    for epoch in range(2):
        for step, batch in enumerate(loader, 16 * epoch):
            for optimizer, rate in ((adam, LR), (sgd, TABLE_LR)):
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = rate * factors[step]
            F.binary_cross_entropy_with_logits(plain(batch), batch.label).backward()
            adam.step()
            sgd.step()
    for name, value in plain.tables.lookup.state_dict().items():
        torch.testing.assert_close(learner.tables.lookup.table(name), value, rtol=1e-4, atol=1e-5)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(learner.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@every_backend
@every_schedule
def test_a_schedule_goes_on_from_a_checkpoint_exactly(toy, tmp_path, schedule, backend) -> None:
    made = partial(task, toy, schedule=schedule, backend=backend)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=11, save_top_k=-1)
    whole, resumed = made(), made()
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saver]).fit(whole, DataModule(str(toy), BATCH))
    data = DataModule(str(toy), BATCH)
    trainer(tmp_path).fit(resumed, data, ckpt_path=tmp_path / "step=11.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_learning_rate_configured_anew_holds_where_training_goes_on(toy, tmp_path) -> None:
    schedule = Schedule("step", every=8, gamma=0.5)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[saver], max_epochs=1)
    run.fit(task(toy, schedule=schedule), DataModule(str(toy), BATCH))
    rates = Rates()
    changed = task(toy, schedule=schedule, lr=1.0, table_lr=2.0)
    data = DataModule(str(toy), BATCH)
    trainer(tmp_path, callbacks=[rates]).fit(changed, data, ckpt_path=tmp_path / "step=12.ckpt", weights_only=True)
    assert rates.seen[1:] == [pytest.approx([f, 2 * f]) for f in (0.5 ** (step // 8) for step in range(13, STEPS))]


def test_loggers_see_the_rates_of_both(toy, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="run")
    monitor = LearningRateMonitor("step")
    run = trainer(tmp_path, logger=logger, callbacks=[monitor], log_every_n_steps=1, max_epochs=1)
    run.fit(task(toy, schedule=Schedule("linear")), DataModule(str(toy), BATCH))
    (rates,) = {tuple(sorted(each)) for each in [monitor.lrs]}
    assert len(rates) == 2
    assert all(rate.startswith("lr-WithTables/pg") for rate in rates)


class Thaw(BaseFinetuning):
    """Trains the tables from the second epoch on."""

    def freeze_before_training(self, module) -> None:
        self.freeze(module.tables)

    def finetune_function(self, module, epoch, optimizer) -> None:
        if epoch == 1:
            module.tables.requires_grad_(True)


@every_backend
def test_tables_are_frozen_and_thawed_by_lightnings_callback(toy, tmp_path, backend) -> None:
    learner, seen = task(toy, backend=backend), []
    seen.append(learner.tables.lookup.table("item").clone())

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            seen.append(module.tables.lookup.table("item").clone())

    trainer(tmp_path, callbacks=[Thaw(), Look()]).fit(learner, DataModule(str(toy), BATCH))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_schedule_that_ends_needs_an_end(toy, tmp_path) -> None:
    run = trainer(tmp_path, max_epochs=-1)
    with pytest.raises(UserError, match="schedule 'cosine' ends with training: set the Trainer's max_epochs"):
        run.fit(task(toy, schedule=Schedule("cosine")), DataModule(str(toy), BATCH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "exponential"}, "name must be one of constant, cosine, linear, step; got 'exponential'"),
        ({"warmup_steps": -1}, "warmup_steps must be zero or more, got -1"),
        ({"name": "step", "every": 0}, "every must be at least 1, got 0"),
        ({"floor": 2.0}, "floor must be between 0 and 1, got 2.0"),
    ],
)
def test_mistakes_are_named(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**options)


@pytest.mark.parametrize("backend", ["fbgemm", "native"])
def test_the_ranker_alone_is_clipped_where_tables_have_no_largest_gradient(toy, tmp_path, backend) -> None:
    """As `max_gradient: .inf` says: tables step as without clipping, while the ranker hardly moves."""
    found = {}
    for clip in (None, 1e-9):
        learner = task(toy, backend=backend, table_optimizer="sgd", table_max_gradient=float("inf"))
        start = {name: value.clone() for name, value in learner.model.state_dict().items()}
        options = {"max_steps": 1, "max_epochs": -1, "gradient_clip_val": clip}
        trainer(tmp_path, **options).fit(learner, DataModule(str(toy), BATCH))
        moved = max(float((learner.model.state_dict()[name] - value).abs().max()) for name, value in start.items())
        found[clip] = learner.tables.lookup.table("item").clone(), moved
    torch.testing.assert_close(found[None][0], found[1e-9][0])
    assert found[1e-9][1] < found[None][1]
