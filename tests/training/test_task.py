"""The task and the data module under Lightning's Trainer: it learns, measures rightly, and resumes exactly."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchrec import EmbeddingBagCollection as TorchrecCollection
from torchrec import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from embtab.datasets.reader import ParquetBatches
from embtab.errors import UserError
from embtab.models import AutoInt
from embtab.quantise import served
from embtab.training import metrics
from embtab.training.checkpoint import load_tables, read_checkpoint
from embtab.training.data import DataModule
from embtab.training.task import FitTask, RankingTask, gathered

SMALL = partial(AutoInt, attention_dim=8, num_layers=1, dnn=(16,), dropout=0.2)
BATCH = 128


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, **quiet, **options}
    return L.Trainer(default_root_dir=folder, **options)


def task(toy: Path, **options) -> FitTask:
    L.seed_everything(1, verbose=False)
    return FitTask(str(toy), **{"dim": 8, "lr": 0.01, "model": SMALL, **options})


def same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("backend", "optimizer"), [("fbgemm", "rowwise_adagrad"), ("fbgemm", "adagrad"), ("fbgemm", "sgd"), ("torch", "")]
)
def test_learns_the_toy(toy, tmp_path, backend, optimizer):
    options = {"table_optimizer": optimizer, "table_lr": 5.0 if optimizer == "sgd" else 0.2} if optimizer else {}
    learner, data = task(toy, backend=backend, **options), DataModule(str(toy), BATCH)
    run = trainer(tmp_path, max_epochs=6)
    before = run.validate(learner, data, verbose=False)[0]
    run.fit(learner, data)
    after = run.validate(learner, data, verbose=False)[0]
    assert before["val/auc"] < 0.7
    assert after["val/auc"] > 0.85
    assert after["val/ne"] < 0.75
    assert after["val/logloss"] < before["val/logloss"]
    assert after["val/calibration"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("method", ["hash", "unified", "qr"])
def test_every_method_trains(toy, tmp_path, method):
    learner, data = task(toy, method=method, budget="0.9x"), DataModule(str(toy), BATCH)
    before = [value.clone() for value in learner.tables.lookup.state_dict().values()]
    trainer(tmp_path).fit(learner, data)
    after = learner.tables.lookup.state_dict().values()
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(changed)


def test_test_and_prediction_read_rows_as_served_and_leave_the_trained_ones(toy, tmp_path):
    learner, data = task(toy, precision="int4", init_std=0.3, table_lr=0.5), DataModule(str(toy), BATCH)
    run = trainer(tmp_path)
    run.fit(learner, data)
    trained = {name: value.clone() for name, value in learner.state_dict().items()}
    (tested,) = run.test(learner, data, verbose=False)
    same(trained, learner.state_dict())
    predicted = torch.cat(run.predict(learner, data))
    same(trained, learner.state_dict())
    (validated,) = run.validate(learner, data, verbose=False)
    whole = {split: next(iter(ParquetBatches(toy, split, 1_000))) for split in ("valid", "test")}
    with torch.no_grad():
        as_trained = metrics.evaluate(whole["valid"].label.numpy(), learner.eval()(whole["valid"]).numpy())
        for name in learner.tables.plan.tables:
            rows = learner.tables.lookup.table(name)
            rows.copy_(served(rows.clone(), "int4"))
        logits = learner(whole["test"]).numpy()
    assert validated["val/logloss"] == pytest.approx(as_trained["logloss"], rel=1e-6)
    assert tested["test/logloss"] == pytest.approx(metrics.evaluate(whole["test"].label, logits)["logloss"], rel=1e-6)
    np.testing.assert_allclose(predicted, metrics.sigmoid(logits), rtol=1e-5)


@pytest.mark.parametrize("backend", ["fbgemm", "native", "torch"])
def test_training_goes_on_after_a_test_as_without_it(toy, tmp_path, backend):
    def states(between):
        learner, data = task(toy, precision="int4", backend=backend, init_std=0.3), DataModule(str(toy), BATCH)
        trainer(tmp_path, max_steps=3).fit(learner, data)
        between(learner, data)
        torch.manual_seed(2)  # of dropout
        trainer(tmp_path, max_steps=3).fit(learner, data)
        return learner.state_dict()

    class Stops(L.Callback):
        def on_test_batch_end(self, *_):
            raise RuntimeError("no space for the log")

    def broken_test(learner, data):
        with pytest.raises(RuntimeError, match="no space"):
            trainer(tmp_path, callbacks=[Stops()]).test(learner, data)
        learner.train()  # Lightning leaves modules in evaluation mode

    expected = states(lambda learner, data: None)
    same(expected, states(lambda learner, data: trainer(tmp_path).test(learner, data, verbose=False)))
    same(expected, states(broken_test))


def test_rows_of_an_interrupted_validation_are_forgotten(toy, tmp_path):
    class Stops(L.Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("no space for the log")

    learner, data = task(toy), DataModule(str(toy), BATCH)
    with pytest.raises(RuntimeError, match="no space"):
        trainer(tmp_path, callbacks=[Stops()]).fit(learner, data)
    after, again = (trainer(tmp_path).test(learner, data, verbose=False)[0] for _ in range(2))
    assert after == again


def test_one_class_is_said(toy, tmp_path, monkeypatch):
    keep = RankingTask._keep

    def clicked_never(learner, batch):
        batch.label.zero_()
        keep(learner, batch)

    monkeypatch.setattr(RankingTask, "_keep", clicked_never)
    with pytest.warns(UserWarning, match=r"all 1000 rows of val have the label 0: val/auc and val/ne are not defined"):
        (found,) = trainer(tmp_path).validate(task(toy), DataModule(str(toy), BATCH), verbose=False)
    assert np.isnan(found["val/auc"])


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_are_in_file_order(toy, tmp_path, workers):
    learner = task(toy)
    data = DataModule(str(toy), 77, num_workers=workers, predict_split="valid")
    predicted = torch.cat(trainer(tmp_path).predict(learner, data))
    with torch.no_grad():
        expected = torch.sigmoid(learner.eval()(next(iter(ParquetBatches(toy, "valid", 1_000)))))
    torch.testing.assert_close(predicted, expected)


def test_logged_metrics_are_those_of_all_rows(toy, tmp_path):
    learner, data = task(toy), DataModule(str(toy), BATCH)
    logged = trainer(tmp_path).test(learner, data, verbose=False)[0]
    whole = next(iter(ParquetBatches(toy, "test", 1_000)))
    with torch.no_grad():
        logits = learner.eval()(whole).numpy()
    expected = metrics.evaluate(whole.label.numpy(), logits, whole.user.numpy())
    assert logged.keys() == {f"test/{name}" for name in expected}
    for name, value in expected.items():
        assert logged[f"test/{name}"] == pytest.approx(value, rel=1e-5)
    probabilities = torch.cat(trainer(tmp_path).predict(learner, data))
    np.testing.assert_allclose(probabilities, metrics.sigmoid(logits), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("cut", [7, 16, 23])  # in the first epoch, at its end, in the second; an epoch has 16 batches
def test_resumes_exactly(toy, tmp_path, cut, optimizer):
    def learner():
        return task(toy, method="qr", budget="0.9x", table_optimizer=optimizer)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=cut, save_top_k=-1)
    whole = learner()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[saver]).fit(
        whole, DataModule(str(toy), BATCH)
    )
    resumed = learner()
    run = trainer(tmp_path, max_epochs=3)
    run.fit(resumed, DataModule(str(toy), BATCH), ckpt_path=tmp_path / f"step={cut}.ckpt", weights_only=True)
    assert run.global_step == 48
    same(whole.state_dict(), resumed.state_dict())
    assert any(name.endswith(".optimizer") for name in whole.state_dict())


@pytest.mark.parametrize("limit", [1.0, 5])
@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_resumes_exactly_from_the_end_of_an_epoch(toy, tmp_path, limit, on_train_epoch_end):
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end, every_n_epochs=1
    )
    whole, options = task(toy), {"max_epochs": 3, "limit_train_batches": limit}
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saver], **options).fit(whole, DataModule(str(toy), BATCH))
    resumed = task(toy)
    trainer(tmp_path, **options).fit(
        resumed, DataModule(str(toy), BATCH), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    same(whole.state_dict(), resumed.state_dict())


def test_a_run_stopped_by_max_steps_goes_on_exactly(toy, tmp_path):
    def run(max_steps, **options):
        learner = task(toy)
        runner = trainer(tmp_path, max_steps=max_steps, max_epochs=-1)
        runner.fit(learner, DataModule(str(toy), BATCH), **options)
        runner.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return learner

    run(9)
    same(run(20).state_dict(), run(20, ckpt_path=tmp_path / "9.ckpt", weights_only=True).state_dict())


def test_reading_processes_resume_exactly_too(toy, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7)
    whole, resumed = task(toy), task(toy)
    run = trainer(tmp_path, max_steps=12, max_epochs=-1, enable_checkpointing=True, callbacks=[saver])
    run.fit(whole, DataModule(str(toy), BATCH, num_workers=2))
    trainer(tmp_path, max_steps=12, max_epochs=-1).fit(
        resumed, DataModule(str(toy), BATCH, num_workers=2), ckpt_path=tmp_path / "step=7.ckpt", weights_only=True
    )
    same(whole.state_dict(), resumed.state_dict())


def test_epochs_differ_and_are_complete(toy):
    loader = DataModule(str(toy), BATCH).train_dataloader()
    epochs = [torch.cat([batch.dense[:, 0] for batch in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert len(epochs[0]) == 2_000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_rows_train_the_same_tables(toy, tmp_path):
    states = []
    for compile_rows in (False, True):
        learner = task(toy, method="qr", budget="0.9x", compile_rows=compile_rows)
        trainer(tmp_path, max_epochs=1).fit(learner, DataModule(str(toy), BATCH))
        states.append(learner.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resuming_other_data_is_refused(toy):
    state = DataModule(str(toy), BATCH).train_dataloader().state_dict()
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        DataModule(str(toy), BATCH, seed=1).train_dataloader().load_state_dict(state)


def test_checkpoint_is_plain_and_gives_the_tables_back(toy, tmp_path):
    learner = task(toy, method="unified", budget="0.9x")
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path / "c")])
    run.fit(learner, DataModule(str(toy), BATCH))
    path = tmp_path / "made.ckpt"
    run.save_checkpoint(path)
    entry = torch.load(path, weights_only=True)["embtab"]
    entry.pop("random_state")
    assert json.loads(json.dumps(entry)) == entry
    assert entry["plan"] == learner.tables.plan.to_dict()
    assert entry["about"]["fingerprint"] == DataModule(str(toy)).dataset.fingerprint
    batch = next(iter(ParquetBatches(toy, "test", 100)))
    for backend in ("torch", "fbgemm"):
        with torch.no_grad():
            torch.testing.assert_close(
                load_tables(path, backend)(batch.sparse).values(), learner.tables(batch.sparse).values()
            )


def test_another_plan_is_refused(toy, tmp_path):
    run = trainer(tmp_path)
    run.fit(task(toy), DataModule(str(toy), BATCH))
    run.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(UserError, match="another plan"):
        trainer(tmp_path).test(
            task(toy, method="hash", budget="0.5x"), DataModule(str(toy)), ckpt_path=tmp_path / "dense.ckpt"
        )


def test_unreadable_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.ckpt: no such checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.ckpt")
    for name in ("text", "empty", "other", "list", "pickled"):
        with pytest.raises(UserError, match=rf"{name}\.ckpt: .*embtab"):
            read_checkpoint(tmp_path / f"{name}.ckpt")


def test_a_loss_that_is_not_finite_stops_with_the_step(toy, tmp_path):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))
            self.calls = 0

        def forward(self, dense, embeddings):
            self.calls += 1
            return embeddings.sum((1, 2)) + self.bias + (float("nan") if self.calls == 4 else 0.0)

    learner = task(toy, model=lambda num_dense, num_features, dim: Breaks())
    with pytest.raises(UserError, match=r"loss became nan at step 3 \(epoch 0\)"):
        trainer(tmp_path, limit_val_batches=0).fit(learner, DataModule(str(toy), BATCH))


def test_takes_torchrec_tables_and_any_key_order(toy, tmp_path):
    class Reversed(nn.Module):
        """Answers with its keys in another order, as a sharded collection may."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            found = self.inner(features)
            keys = found.keys()[::-1]
            return KeyedTensor(keys, [4] * len(keys), torch.cat([found[key] for key in keys], 1))

    plain = TorchrecCollection(
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=rows, feature_names=[name])
            for name, rows in (("item", 40), ("tags", 20))
        ]
    )
    model = AutoInt(1, 2, 4, attention_dim=8, dnn=(8,))
    batch = next(iter(ParquetBatches(toy, "train", 50)))
    torch.testing.assert_close(RankingTask(plain, model)(batch), RankingTask(Reversed(plain), model)(batch))
    before = plain.state_dict()["embedding_bags.item.weight"].clone()
    trainer(tmp_path).fit(RankingTask(plain, model), DataModule(str(toy), BATCH))
    assert not torch.equal(before, plain.state_dict()["embedding_bags.item.weight"])


def _gather_on(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mine = [(np.full(rank + 1, rank), None)]
    rows = gathered(mine)
    torch.distributed.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps([row[0].tolist() for row in rows]))


@pytest.mark.distributed
def test_metrics_see_the_rows_of_every_rank(tmp_path):
    torch.multiprocessing.spawn(_gather_on, (str(tmp_path),), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[[0], [1, 1]]] * 2
