"""Sequence models under Lightning: what they are fed, that searching first changes nothing, and that they learn."""

import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab import cli
from embtab.datasets import long_histories
from embtab.datasets.reader import Batch, ParquetBatches
from embtab.errors import UserError
from embtab.features import Feature
from embtab.fused import Optimizer
from embtab.models import DARE, DIN, MeanPool
from embtab.planning import plan
from embtab.quantise import served
from embtab.reader import Bundle
from embtab.tables import EmbeddingCollection
from embtab.training.checkpoint import load_tables
from embtab.training.data import DataModule
from embtab.training.layout import Layout
from embtab.training.regularise import id_counts, minibatch_l2
from embtab.training.search_quality import INFORMATION, information, mutual_information, search_quality
from embtab.training.sequence_task import FitSequenceTask, SequenceTask

FEATURES = [
    Feature("user", 5),
    Feature("tags", 4, "mean"),
    Feature("position", 7, id_space="positions"),
    Feature("item", 9, id_space="items", counts=np.arange(1, 10)),
    Feature("past_position", 7, "none", id_space="positions"),
    Feature("past", 9, "none", id_space="items", counts=np.arange(9) * 2),
]
SMALL = {"hidden": (16,)}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batch(seed: int = 0, rows: int = 6, longest: int = 6, empty: bool = False) -> Batch:
    rng = np.random.default_rng(seed)
    past = np.zeros(rows, np.int64) if empty else rng.integers(0, longest + 1, rows)
    if not empty:
        past[0] = longest
    tags = rng.integers(0, 3, rows)
    lengths = {name: np.ones(rows, np.int64) for name in ("user", "position", "item")}
    lengths |= {"tags": tags, "past": past, "past_position": past}
    values = [torch.from_numpy(rng.integers(0, f.num_ids, int(lengths[f.name].sum()))) for f in FEATURES]
    sparse = KeyedJaggedTensor(
        [f.name for f in FEATURES],
        torch.cat(values),
        lengths=torch.cat([torch.from_numpy(lengths[f.name]) for f in FEATURES]),
    )
    return Batch(torch.empty(rows, 0), sparse, torch.from_numpy(rng.integers(0, 2, rows)).float())


def collection(
    features=FEATURES, dim: int = 4, backend: str = "torch", seed: int = 0, **options
) -> EmbeddingCollection:
    torch.manual_seed(seed)
    return EmbeddingCollection(plan(features, dim=dim, **options), backend, init_std=0.5)


def events(features=FEATURES) -> list[Feature]:
    return [feature for feature in features if feature.name not in ("user", "tags")]


def tasks() -> dict[str, SequenceTask]:
    torch.manual_seed(1)
    shape = (0, 2, 2, 4)
    return {
        "mean": SequenceTask(collection(), MeanPool(*shape, **SMALL)),
        "din": SequenceTask(collection(), DIN(*shape, **SMALL)),
        "twin": SequenceTask(collection(), DARE(*shape, top_k=2, **SMALL)),
        "dare": SequenceTask(collection(), DARE(*shape, top_k=2, **SMALL), attention=collection(events(), dim=3)),
    }


def table(tables: EmbeddingCollection, name: str) -> torch.Tensor:
    return tables.lookup.table(name)


def test_layout_knows_targets_histories_and_the_rest():
    layout = Layout.of(FEATURES)
    assert layout.targets == ("item", "position")  # the position comes last
    assert layout.histories == ("past", "past_position")
    assert [feature.name for feature in layout.others] == ["user", "tags"]


def test_what_a_model_is_fed():
    task, one = tasks()["dare"], batch()
    seen = []
    task.model.top_k = 0
    task.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    task(one)
    _, others, found, attention = seen
    ids = {name: one.sparse[name].values() for name in one.sparse.keys()}  # noqa: SIM118
    for tables, got in ((task.tables, found), (task.attention, attention)):
        torch.testing.assert_close(got.target[:, 0], table(tables, "items")[ids["item"]])
        torch.testing.assert_close(got.target[:, 1], table(tables, "positions")[ids["position"]])
        torch.testing.assert_close(got.history[:, 0], table(tables, "items")[ids["past"]])
        torch.testing.assert_close(got.history[:, 1], table(tables, "positions")[ids["past_position"]])
        assert torch.equal(got.lengths, one.sparse["past"].lengths())
    tags = torch.split(table(task.tables, "tags")[ids["tags"]], one.sparse["tags"].lengths().tolist())
    means = torch.stack([bag.mean(0) if len(bag) else torch.zeros(4) for bag in tags])
    torch.testing.assert_close(others, torch.stack([table(task.tables, "user")[ids["user"]], means], dim=1))


@pytest.mark.parametrize("name", ["twin", "dare"])
def test_searching_before_looking_up_changes_neither_logits_nor_gradients(name):
    one = batch()
    found = []
    for search in (True, False):
        task = tasks()[name].eval()
        if not search:
            task._searched = lambda sparse: sparse
        logits = task(one)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in task.parameters())])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_the_auxiliary_loss_sees_the_whole_history():
    """It adds the loss of a head over all events, and so reaches rows of events that the search passed over."""
    torch.manual_seed(1)
    model = DARE(0, 2, 2, 4, top_k=1, auxiliary=True, **SMALL)
    task = SequenceTask(collection(), model, attention=collection(events(), dim=3))
    one = batch()
    looked_up = []
    hook = task.tables.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]["past"].lengths()))
    loss = task.loss(one)
    assert torch.equal(looked_up[0], one.sparse["past"].lengths())
    hook.remove()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    whole, attention = (task.layout.gathered(each(one.sparse)) for each in (task.tables, task.attention))
    model.top_k = 0
    product = whole.target.flatten(1) * model.summary(whole, attention)
    wanted = bce(model.whole(product), one.label)
    model.top_k = 1
    torch.testing.assert_close(loss, bce(task(one), one.label) + wanted)
    task.eval()
    task.tables.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]["past"].lengths()))
    task(one)
    assert looked_up[-1].max() == 1  # serving searches first
    with pytest.raises(UserError, match="no auxiliary head"):
        tasks()["dare"].model.auxiliary_logits(whole, attention)


def test_the_backward_pass_touches_only_what_was_found():
    task, one = tasks()["dare"], batch(longest=6)
    looked_up = []
    task.tables.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]["past"].lengths()))
    task(one)
    assert torch.equal(looked_up[0].long(), one.sparse["past"].lengths().clamp(max=2))


@pytest.mark.parametrize("name", ["mean", "din", "twin", "dare"])
def test_empty_histories_train_without_nan(name):
    task = tasks()[name]
    loss = task.loss(batch(empty=True))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_minibatch_l2_against_the_paper():
    """w_j / n_j for every id of the batch, once each; nothing for ids that are not in it."""
    tables, one = collection(), batch(3, rows=2, longest=3)
    counts = id_counts([feature for feature in FEATURES if feature.space == "items"])
    items = [feature for feature in FEATURES if feature.space == "items"]
    minibatch_l2(tables(one.sparse), one.sparse, items, counts).backward()
    gradient = tables.lookup.listed["items"].grad
    present = torch.zeros(9)
    present[torch.cat([one.sparse["item"].values(), one.sparse["past"].values()])] = 1
    n = torch.arange(1, 10) + torch.arange(9) * 2
    torch.testing.assert_close(gradient, (present / n).unsqueeze(1) * table(tables, "items"))
    assert 0 < present.sum() < 9
    others = [each.grad for name, each in tables.lookup.listed.items() if name != "items"]
    assert all(each is None or not each.any() for each in others)


def test_minibatch_l2_reaches_fused_tables():
    """With SGD inside backward and no other loss, a row of the batch shrinks by lr * l2 / n, and no other row moves."""
    one = batch(3, rows=2, longest=3)
    items = [feature for feature in FEATURES if feature.space == "items"]
    tables = EmbeddingCollection(plan(FEATURES, dim=4), "fbgemm", Optimizer("sgd", lr=0.5), init_std=0.5)
    before = table(tables, "items").clone()
    others = table(tables, "user").clone()
    (0.1 * minibatch_l2(tables(one.sparse), one.sparse, items, id_counts(items))).backward()
    present = torch.zeros(9)
    present[torch.cat([one.sparse["item"].values(), one.sparse["past"].values()])] = 1
    n = torch.arange(1, 10) + torch.arange(9) * 2
    torch.testing.assert_close(table(tables, "items"), before * (1 - 0.5 * 0.1 * present / n).unsqueeze(1))
    assert torch.equal(table(tables, "user"), others)


def test_l2_is_added_to_the_loss_of_both_collections():
    features = [Feature(f.name, f.num_ids, f.pooling, np.ones(f.num_ids), f.id_space) for f in FEATURES]
    made = {}
    for l2 in (0.0, 2.0):
        torch.manual_seed(0)
        model = DARE(0, 2, 2, 4, top_k=0, **SMALL).eval()
        made[l2] = SequenceTask(collection(features), model, attention=collection(events(features), dim=3), l2=l2)
    one, with_l2 = batch(), made[2.0]
    wanted = sum(
        minibatch_l2(each(one.sparse), one.sparse, each.plan.features, id_counts(each.plan.features))
        for each in (with_l2.tables, with_l2.attention)
    )
    torch.testing.assert_close(with_l2.loss(one) - made[0.0].loss(one), 2 * wanted)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "data"
    options = {"min_length": 15, "max_length": 25, "items": 60, "interests": 6, "per_user": 3, "signal": 3.0}
    long_histories.prepare(out, users=1500, targets=4, per_category=2, **options)
    return out


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return L.Trainer(default_root_dir=folder, **options)


def fitted(planted: Path, folder: Path, epochs: int, **options) -> tuple[FitSequenceTask, dict[str, float]]:
    L.seed_everything(0, verbose=False)
    task = FitSequenceTask(str(planted), **{"dim": 8, "table_lr": 0.1, "lr": 0.003, **options})
    data = DataModule(str(planted), 128)
    run = trainer(folder, max_epochs=epochs)
    run.fit(task, data)
    return task, run.test(task, data, verbose=False)[0]


def test_dare_learns_what_matters(planted, tmp_path):
    model = partial(DARE, top_k=8, **SMALL)
    attention = {"method": "hash", "budget": "0.8x", "dim": 4}
    fresh, _ = fitted(planted, tmp_path, 0, model=model, attention=attention)
    task, found = fitted(planted, tmp_path, 9, model=model, attention=attention)
    assert found["test/auc"] > 0.75
    assert search_quality(task, planted) > search_quality(fresh, planted) + 0.03
    assert task.attention.plan.dim == 4
    assert task.attention.plan.nbytes <= task.attention.plan.budget < task.tables.plan.nbytes


@pytest.mark.parametrize(
    "options",
    [
        {"model": partial(DIN, **SMALL), "l2": 0.01},
        {"model": partial(DIN, softmax=True, **SMALL), "method": "qr", "budget": "0.5x"},
        {"model": partial(MeanPool, **SMALL), "method": "unified", "budget": "0.5x", "backend": "torch"},
        {"model": partial(DARE, top_k=0, **SMALL), "leave_out": ["category", "history_category"]},
    ],
)
def test_every_model_trains_on_any_table(planted, tmp_path, options):
    task, found = fitted(planted, tmp_path, 1, **options)
    fresh, before = fitted(planted, tmp_path, 0, **options)
    assert found["test/logloss"] != before["test/logloss"]
    assert np.isfinite(list(found.values())).all()
    assert any(
        not torch.equal(task.tables.lookup.table(t), fresh.tables.lookup.table(t)) for t in task.tables.plan.tables
    )


def test_the_test_reads_rows_as_served_in_both_collections(planted, tmp_path):
    own = {"method": "dense", "dim": 4, "precision": "int8"}
    task, data = (
        FitSequenceTask(str(planted), dim=8, precision="int4", attention=own, model=partial(DARE, top_k=3)),
        DataModule(str(planted), 100),
    )
    before = {name: value.clone() for name, value in task.state_dict().items()}
    seen = {}

    class Sees(L.Callback):
        def on_test_batch_start(self, trainer, pl_module, *_):
            seen.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    trainer(tmp_path, callbacks=[Sees()]).test(task, data, verbose=False)
    for name, precision in (("tables", "int4"), ("attention", "int8")):
        for table in getattr(task, name).plan.tables:
            key = f"{name}.lookup.{table}"
            assert torch.equal(seen[key], served(before[key], precision))
            assert not torch.equal(seen[key], before[key])
            assert torch.equal(task.state_dict()[key], before[key])


def test_search_quality_against_a_loop(planted, tmp_path):
    task, _ = fitted(planted, tmp_path, 0, model=partial(DIN, **SMALL))
    task.eval()
    found = []
    world = long_histories.World.drawn(60, 6, 2, np.random.default_rng((0, 0)))
    for each in ParquetBatches(planted, "test", 100):
        scores = task.scores(each).split(each.sparse["history_item"].lengths().tolist())
        items = each.sparse["history_item"].values().split(each.sparse["history_item"].lengths().tolist())
        for target, past, given in zip(each.sparse["item"].values(), items, scores, strict=True):
            relevant = world.interest[past.numpy()] == world.interest[target]
            gains = relevant[np.argsort(-given.numpy(), kind="stable")] / np.log2(np.arange(len(past)) + 2)
            if relevant.any():
                found.append(gains.sum() / (1 / np.log2(np.arange(relevant.sum()) + 2)).sum())
    # Equal events tie; they are equally relevant, so their order does not matter.
    assert search_quality(task, planted, batch_size=37) == pytest.approx(np.mean(found), abs=1e-6)


def test_mutual_information_against_a_loop_and_by_hand(planted):
    """By plain counting; and where a fact decides the other, the information is the entropy of either."""
    found = mutual_information(planted)
    rows = []
    for each in ParquetBatches(planted, "train", 500, rank=0, world_size=1):
        past = each.sparse["history_category"].values().split(each.sparse["history_category"].lengths().tolist())
        targets = each.sparse["category"].values().tolist()
        rows += [(t, int(y), set(p.tolist())) for t, y, p in zip(targets, each.label, past, strict=True)]
    for target, event in np.ndindex(found.shape):
        own = [(y, event in past) for t, y, past in rows if t == target]
        wanted = 0.0
        for y, x in set(own):
            p, p_y, p_x = (
                np.mean(facts)
                for facts in ([o == (y, x) for o in own], [o[0] == y for o in own], [o[1] == x for o in own])
            )
            wanted += p * np.log(p / (p_y * p_x))
        assert found[target, event] == pytest.approx(wanted, abs=1e-12)
    present = np.array([[0.0, 5.0, 0.0], [10.0, 5.0, 0.0]])  # [no click, click] by case
    absent = np.array([[30.0, 5.0, 0.0], [0.0, 5.0, 0.0]])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(information(present, absent), [entropy, 0, 0], atol=1e-15)


def test_search_quality_by_mutual_information_against_a_loop(planted, tmp_path):
    task, _ = fitted(planted, tmp_path, 0, model=partial(DIN, **SMALL))
    task.eval()
    known, wanted = mutual_information(planted), []
    for each in ParquetBatches(planted, "test", 100):
        lengths = each.sparse["history_category"].lengths().tolist()
        scores = task.scores(each).split(lengths)
        past = each.sparse["history_category"].values().split(lengths)
        for target, own, given in zip(each.sparse["category"].values(), past, scores, strict=True):
            wanted.append(ndcg_of_a_row(known[target, own], given.numpy(), 5))
    found = search_quality(task, planted, k=5, batch_size=37, relevance=INFORMATION)
    assert found == pytest.approx(np.mean(wanted), abs=2e-4)  # float32 scores tie by chance; ties are averaged there


def ndcg_of_a_row(gains: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Equal scores share the mean of their gains, which for equal events is their gain."""
    discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
    return float((gains[np.argsort(-scores, kind="stable")][:k] @ discount) / (np.sort(gains)[::-1][:k] @ discount))


def test_checkpoints_of_other_attention_tables_are_refused(planted, tmp_path):
    def task(dim: int) -> FitSequenceTask:
        return FitSequenceTask(str(planted), dim=6, model=partial(DARE, **SMALL), attention={"dim": dim})

    run, trained = trainer(tmp_path, max_steps=2, enable_checkpointing=True), task(4)
    run.fit(trained, DataModule(str(planted), 128))
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path)
    again, other = task(4), task(2)
    checkpoint = torch.load(path, weights_only=True)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    with pytest.raises(UserError, match="other attention tables"):
        other.on_load_checkpoint(checkpoint)
    for part, name, tables in (
        ("tables", "representation", trained.tables),
        ("attention", "attention", trained.attention),
    ):
        cli.main(["export", str(path), str(tmp_path / part), "--part", name])
        bundle = Bundle(tmp_path / part)
        assert bundle.plan["dim"] == tables.plan.dim
        wanted = tables(next(iter(ParquetBatches(planted, "test", 50))).sparse)["item"].values().detach()
        ids = next(iter(ParquetBatches(planted, "test", 50))).sparse["item"].values()
        np.testing.assert_allclose(bundle.lookup("item", ids.numpy()), wanted.numpy(), rtol=1e-6)
        loaded = load_tables(path, part=part)
        assert isinstance(loaded, EmbeddingCollection)
        assert all(torch.equal(loaded.lookup.table(name), tables.lookup.table(name)) for name in tables.plan.tables)


def test_a_part_that_is_not_there_is_not_exported(planted, tmp_path, capsys):
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(FitSequenceTask(str(planted), dim=4, model=partial(DARE, **SMALL)), DataModule(str(planted), 128))
    path = tmp_path / "shared.ckpt"
    run.save_checkpoint(path)
    for arguments, message in (([], "no tables of its own"), (["--format", "onnx"], "--part is of checkpoints")):
        with pytest.raises(SystemExit):
            cli.main(["export", str(path), str(tmp_path / "out"), "--part", "attention", *arguments])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_mistakes_are_named(planted):
    with pytest.raises(UserError, match="no history"):
        Layout.of(FEATURES[:4])
    with pytest.raises(UserError, match="needs one target"):
        Layout.of([f for f in FEATURES if f.name != "item"])
    shape = (0, 2, 2, 4)
    with pytest.raises(UserError, match="DIN has no use"):
        SequenceTask(collection(), DIN(*shape), attention=collection(events()))
    with pytest.raises(UserError, match="has_position=True"):
        SequenceTask(collection(), DARE(*shape, has_position=False))
    part = [f for f in events() if f.space == "items"]
    with pytest.raises(UserError, match="the same target and history"):
        SequenceTask(collection(), DARE(*shape), attention=collection(part))
    with pytest.raises(UserError, match="l2 needs the counts"):
        SequenceTask(collection(), DIN(*shape), l2=0.1)
    with pytest.raises(UserError, match="gives no scores"):
        tasks()["mean"].scores(batch())
    one = batch()
    lengths = one.sparse.lengths().clone()
    at = one.sparse.keys().index("past") * 6
    lengths[at : at + 2] += torch.tensor([-1, 1])
    one.sparse = KeyedJaggedTensor(one.sparse.keys(), one.sparse.values(), lengths=lengths)
    with pytest.raises(UserError, match="differ in length"):
        tasks()["din"](one)
    with pytest.raises(UserError, match="leave_out names a feature 'x'"):
        FitSequenceTask(str(planted), leave_out=["x"])
    with pytest.raises(UserError, match="no setting 'size'"):
        FitSequenceTask(str(planted), attention={"size": 1}, model=DARE)


def test_models_have_no_other_parameters_than_dense_ones():
    task = SequenceTask(EmbeddingCollection(plan(FEATURES, dim=4)), DIN(0, 2, 2, 4))
    assert {id(p) for p in et.outer_parameters(task)} == {id(p) for p in task.model.parameters()}
    assert isinstance(task.model, nn.Module)


def test_fit_from_a_configuration_file(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    described = yaml.safe_load((CONFIGS / "fit_lastfm_dare.yaml").read_text())
    described["data"] = {"path": str(planted), "batch_size": 256}
    described["model"] |= {"leave_out": [], "dim": 4}
    described["trainer"]["max_epochs"] = 1
    Path("config.yaml").write_text(yaml.safe_dump(described))
    cli.main(["fit", "--config", "config.yaml", "--trainer.accelerator", "cpu"])
    shown = capsys.readouterr().err
    assert "attention:" in shown
    assert "hash" in shown
    run = Path("runs/lastfm/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == "sequences"
    cli.main(["test", "--config=config.yaml", "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "config.yaml", "--task", "pictures"])
    assert "pictures" in capsys.readouterr().err
