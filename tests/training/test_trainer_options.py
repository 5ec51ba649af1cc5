"""Each option of the Trainer that users turn on trains what a plain loop trains, to the last bit, or is refused.

The loops here know nothing of Lightning: batches of the reader, `loss.backward()`, `optimizer.step()`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from toy import write_toy

import embtab as et
from embtab.datasets.reader import ParquetBatches
from embtab.errors import UserError
from embtab.training.task import RankingTask

BACKENDS = ("torch", "fbgemm", "native")
FUSED = ("fbgemm", "native")
BATCH, PER_EPOCH = 40, 6
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("options") / "data", rows={"train": 240, "valid": 100, "test": 50})


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(8, generator=draw))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, dense, vectors):
        return self.norm(vectors.flatten(1)) @ self.weight + dense[:, 0]


def task(data: Path, backend: str, kind: type[RankingTask] = RankingTask, **optimizer) -> RankingTask:
    plan = et.plan(et.read_features(data), "dense", dim=4, precision="int8")
    fused = None if backend == "torch" else et.Optimizer("adagrad", lr=0.1, **optimizer)
    tables = et.EmbeddingBagCollection(plan, backend=backend, optimizer=fused)
    tables.init(0.1, seed=3)
    return kind(tables, Head(), lr=0.01)


def module(data: Path) -> et.DataModule:
    return et.DataModule(str(data), BATCH)


def batches(data: Path, epochs: int, per_epoch: int = PER_EPOCH, shuffle: bool = True, size: int = BATCH) -> Iterator:
    stream = ParquetBatches(data, "train", size, shuffle=shuffle)
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        yield from list(stream)[:per_epoch]


def outer(learner: RankingTask) -> list[nn.Parameter]:
    """What an optimizer outside trains."""
    tables = {id(each) for each in learner.tables.parameters()} if learner.tables.lookup.fused is not None else set()
    return [each for each in learner.parameters() if id(each) not in tables]


def loop(
    learner: RankingTask,
    given: Iterator,
    every: int = 1,
    clip: Callable[[list[nn.Parameter]], object] = lambda parameters: None,
    autocast: bool = False,
    factor: Callable[[int], float] | None = None,
    after: Callable[[RankingTask, int], object] = lambda learner, step: None,
    steps: int = 10**6,
) -> dict[str, torch.Tensor]:
    """The state after training on these batches, a step every so many."""
    adam = torch.optim.Adam(outer(learner), lr=learner.lr)
    fused = learner.tables.lookup.fused
    first = None if fused is None else fused.settings.lr
    learner.train()
    for i, batch in enumerate(given):
        step = i // every
        if step == steps:
            break
        if factor is not None:
            adam.param_groups[0]["lr"] = learner.lr * factor(step)
            if fused is not None:
                learner.tables.set_learning_rate(first * factor(step))
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = learner.loss(batch)
        (loss / every).backward()
        if (i + 1) % every == 0:
            clip(outer(learner))
            adam.step()
            adam.zero_grad()
            after(learner, step)
    return state(learner)


def state(learner: RankingTask) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items() if not name.endswith("_extra_state")}


def same(found: dict, expected: dict, exact: bool = True) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **({"rtol": 0, "atol": 0} if exact else {}), msg=name)


def trainer(tmp_path: Path, **options) -> L.Trainer:
    given = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **QUIET, **options}
    return L.Trainer(default_root_dir=tmp_path, **given)


def checkpoints(folder: Path, **options) -> dict:
    return {"enable_checkpointing": True, "callbacks": [cb.ModelCheckpoint(folder, **options)]}


def logged(folder: Path) -> dict:
    return {"logger": CSVLogger(folder), "log_every_n_steps": 1}


# What changes nothing that is trained: (options of the Trainer, made from a folder), epochs.
UNCHANGED: dict[str, tuple[Callable[[Path], dict], int]] = {
    "nothing": (lambda f: {}, 2),
    "devices and strategy": (lambda f: {"devices": 1, "strategy": "auto", "num_nodes": 1}, 2),
    "precision 32-true": (lambda f: {"precision": "32-true"}, 2),
    "min_epochs": (lambda f: {"min_epochs": 2, "max_epochs": 5, "max_steps": 2 * PER_EPOCH}, 2),
    "max_time": (lambda f: {"max_time": {"hours": 1}}, 2),
    "val_check_interval": (lambda f: {"val_check_interval": 0.5}, 2),
    "val_check_interval in batches": (lambda f: {"val_check_interval": 2}, 2),
    "check_val_every_n_epoch": (lambda f: {"check_val_every_n_epoch": 2}, 2),
    "num_sanity_val_steps": (lambda f: {"num_sanity_val_steps": 2}, 2),
    "limit_val_batches": (lambda f: {"limit_val_batches": 1}, 2),
    "no validation": (lambda f: {"limit_val_batches": 0}, 2),
    "reload_dataloaders_every_n_epochs": (lambda f: {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, 3),
    "detect_anomaly": (lambda f: {"detect_anomaly": True}, 2),
    "barebones": (lambda f: {"barebones": True, **dict.fromkeys(("logger", "enable_checkpointing", *QUIET)),
                             "accelerator": "cpu"}, 2),
    "inference_mode": (lambda f: {"inference_mode": False}, 2),
    "deterministic": (lambda f: {"deterministic": "warn"}, 2),
    "benchmark": (lambda f: {"benchmark": True}, 2),
    "sync_batchnorm": (lambda f: {"sync_batchnorm": True}, 2),
    "use_distributed_sampler": (lambda f: {"use_distributed_sampler": False}, 2),
    "profiler": (lambda f: {"profiler": "simple"}, 2),
    "advanced profiler": (lambda f: {"profiler": "advanced"}, 2),
    "progress and summary": (lambda f: {"enable_progress_bar": True, "enable_model_summary": True}, 2),
    "logger": (logged, 2),
    "LearningRateMonitor": (lambda f: {**logged(f), "callbacks": [cb.LearningRateMonitor("step")]}, 2),
    "DeviceStatsMonitor": (lambda f: {**logged(f), "callbacks": [cb.DeviceStatsMonitor(cpu_stats=False)]}, 2),
    "Timer": (lambda f: {"callbacks": [cb.Timer("00:01:00:00")]}, 2),
    "GradientAccumulationScheduler of one": (lambda f: {"callbacks": [cb.GradientAccumulationScheduler({1: 1})]}, 2),
    "EarlyStopping": (lambda f: {"callbacks": [cb.EarlyStopping("val/logloss", patience=5)]}, 2),
    "ModelCheckpoint": (lambda f: checkpoints(f, monitor="val/auc", mode="max", save_last=True), 2),
    "ModelCheckpoint in steps": (lambda f: checkpoints(f, every_n_train_steps=2, save_top_k=-1), 2),
    "ModelSummary": (lambda f: {"enable_model_summary": True, "callbacks": [cb.ModelSummary(3)]}, 2),
    "OnExceptionCheckpoint": (lambda f: {"enable_checkpointing": True, "callbacks": [cb.OnExceptionCheckpoint(f)]}, 2),
    "fast_dev_run": (lambda f: {"fast_dev_run": PER_EPOCH}, 1),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UNCHANGED)
def test_options_that_change_nothing(data, tmp_path, name, backend):
    options, epochs = UNCHANGED[name]
    learner = task(data, backend)
    trainer(tmp_path, **options(tmp_path)).fit(learner, module(data))
    torch.use_deterministic_algorithms(False)
    same(state(learner), loop(task(data, backend), batches(data, epochs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("limit", "per_epoch"), [({"limit_train_batches": 2}, 2), ({"limit_train_batches": 0.5}, 3),
                                                  ({"max_steps": 4, "max_epochs": 1}, 4)])  # fmt: skip
def test_limits(data, tmp_path, backend, limit, per_epoch):
    learner = task(data, backend)
    run = trainer(tmp_path, **limit)
    run.fit(learner, module(data))
    same(state(learner), loop(task(data, backend), batches(data, run.max_epochs, per_epoch)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_overfitting_sees_the_same_batches_in_each_epoch(data, tmp_path, backend):
    learner = task(data, backend)
    trainer(tmp_path, overfit_batches=2, max_epochs=4, limit_val_batches=0).fit(learner, module(data))
    first = list(batches(data, 1, 2, shuffle=False))
    same(state(learner), loop(task(data, backend), iter(first * 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_mixed(data, tmp_path, backend):
    learner = task(data, backend)
    trainer(tmp_path, precision="bf16-mixed").fit(learner, module(data))
    same(state(learner), loop(task(data, backend), batches(data, 2), autocast=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", [{"name": "cosine", "warmup_steps": 3}, {"name": "step", "every": 4}])
def test_schedules(data, tmp_path, backend, schedule):
    from embtab.training.schedule import Schedule

    learner, of = task(data, backend), Schedule(**schedule)
    learner.schedule = of
    trainer(tmp_path).fit(learner, module(data))
    expected = loop(task(data, backend), batches(data, 2), factor=lambda step: of.factor(step, 2 * PER_EPOCH))
    same(state(learner), expected, exact=False)


@pytest.mark.parametrize("cut", [2, PER_EPOCH, PER_EPOCH + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run(data, tmp_path, backend, cut):
    trainer(
        tmp_path, max_epochs=3, **checkpoints(tmp_path, filename="{step}", every_n_train_steps=cut, save_top_k=-1)
    ).fit(task(data, backend), module(data))
    learner = task(data, backend)
    path = tmp_path / f"step={cut}.ckpt"
    trainer(tmp_path, max_epochs=3).fit(learner, module(data), ckpt_path=path, weights_only=True)
    same(state(learner), loop(task(data, backend), batches(data, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_measuring_before_and_between(data, tmp_path, backend):
    learner, given, run = task(data, backend), module(data), trainer(tmp_path)
    run.validate(learner, given, verbose=False)
    run.test(learner, given, verbose=False)
    run.predict(learner, given)
    run.fit(learner, given)
    run.test(learner, given, verbose=False)
    same(state(learner), loop(task(data, backend), batches(data, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_learning_rate_finder(data, tmp_path, backend):
    learner = task(data, backend)
    finder = cb.LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer(tmp_path, callbacks=[finder]).fit(learner, module(data))
    plain = task(data, backend)
    plain.lr = learner.lr
    same(state(learner), loop(plain, batches(data, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_size_finder(data, tmp_path, backend):
    learner, given = task(data, backend), module(data)
    trainer(tmp_path, callbacks=[cb.BatchSizeFinder(init_val=60, max_trials=1, steps_per_trial=1)]).fit(learner, given)
    assert given.batch_size > BATCH
    same(state(learner), loop(task(data, backend), batches(data, 2, size=given.batch_size)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_early_stopping_trains_as_many_epochs_as_it_says(data, tmp_path, backend):
    learner = task(data, backend)
    run = trainer(tmp_path, max_epochs=50, callbacks=[cb.EarlyStopping("val/logloss", patience=1, min_delta=1.0)])
    run.fit(learner, module(data))
    assert run.current_epoch < 50
    same(state(learner), loop(task(data, backend), batches(data, run.current_epoch)))


class Frozen(cb.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.tables)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tables(data, tmp_path, backend):
    learner, plain = task(data, backend), task(data, backend)
    before = state(learner)
    trainer(tmp_path, callbacks=[Frozen()]).fit(learner, module(data))
    plain.tables.requires_grad_(False)
    same(state(learner), loop(plain, batches(data, 2)))
    assert all(torch.equal(value, before[name]) for name, value in state(learner).items() if "lookup" in name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exponential_moving_average(data, tmp_path, backend):
    mean: dict[str, torch.Tensor] = {}

    def update(learner, step):
        for name, value in learner.named_parameters():
            mean[name] = value.detach().clone() if name not in mean else 0.9 * mean[name] + 0.1 * value.detach()

    learner = task(data, backend)
    trainer(tmp_path, callbacks=[cb.EMAWeightAveraging(decay=0.9)]).fit(learner, module(data))
    loop(task(data, backend), batches(data, 2), after=update)
    found = {name: value.detach() for name, value in learner.named_parameters()}
    same(found, mean, exact=False)
    assert any("lookup" in name for name in found)


class Epochs(L.Callback):
    """The parameters as each epoch begins."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_weight_averaging(data, tmp_path, backend):
    learner, epochs = task(data, backend), Epochs()
    averaging = cb.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer(tmp_path, max_epochs=4, callbacks=[epochs, averaging]).fit(learner, module(data))
    mean = {name: torch.stack([each[name] for each in epochs.seen[1:4]]).mean(0) for name in epochs.seen[0]}
    same({name: value.detach() for name, value in learner.named_parameters()}, mean, exact=False)
    assert any("lookup" in name for name in mean)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping(data, tmp_path, backend, algorithm):
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    of = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    if backend in FUSED:
        with pytest.raises(UserError, match=r"gradient_clip_val=0.01 does not reach tables .*max_gradient"):
            trainer(tmp_path, **options).fit(task(data, backend), module(data))
    said = {} if backend == "torch" else {"max_gradient": 0.001}
    learner = task(data, backend, **said)
    trainer(tmp_path, **options).fit(learner, module(data))
    same(state(learner), loop(task(data, backend, **said), batches(data, 2), clip=lambda given: of(given, 0.01)))


def twice(f: Path) -> dict:
    return {"accumulate_grad_batches": 2}


def twice_by_callback(f: Path) -> dict:
    return {"callbacks": [cb.GradientAccumulationScheduler({0: 2})]}


@pytest.mark.parametrize("how", [twice, twice_by_callback])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation(data, tmp_path, backend, how):
    learner, run = task(data, backend), trainer(tmp_path, **how(tmp_path))
    if backend in FUSED:
        with pytest.raises(UserError, match=r"accumulate_grad_batches=2: .*batch_size 2 times as large"):
            run.fit(learner, module(data))
        return
    run.fit(learner, module(data))
    same(state(learner), loop(task(data, backend), batches(data, 2), every=2))


class Scheduled(RankingTask):
    """As users write it: an optimizer of their own, with a schedule."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def scaled(f: Path) -> dict:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}


REFUSED = {
    "a scaler": (scaled, RankingTask, "scales the loss.*bf16-mixed"),
    "bf16-true": (lambda f: {"precision": "bf16-true"}, RankingTask, "'bf16-true': tables .* are float32"),
    "16-true": (lambda f: {"precision": "16-true"}, RankingTask, "'16-true': tables .* are float32"),
    "64-true": (lambda f: {"precision": "64-true"}, RankingTask, "'64-true': tables .* are float32"),
    "a schedule without the tables": (lambda f: {}, Scheduled, r"schedule embtab\.with_tables"),
}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_something_else_is_refused_in_a_line(data, tmp_path, name, backend):
    options, kind, says = REFUSED[name]
    learner = task(data, backend, kind)
    before = copy.deepcopy(state(learner))
    with pytest.raises(UserError, match=says) as caught:
        trainer(tmp_path, **options(tmp_path)).fit(learner, module(data))
    assert "\n" not in str(caught.value)
    same({name: value.float() for name, value in state(learner).items()}, {n: v.float() for n, v in before.items()})
