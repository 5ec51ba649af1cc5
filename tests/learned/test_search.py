"""Every learned method: within its budget, exact once compacted, the same again, and the same after a kill."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import numpy as np
import pytest
import torch
from laws import single_ids
from safetensors.numpy import load_file

import embtab as et
from embtab.compare.sweep import Sweep
from embtab.datasets import synthetic
from embtab.errors import UserError
from embtab.learned import LEARNED, Result, run, train_dense
from embtab.learned.search import with_pareto
from embtab.learned.stages import Stages, read
from embtab.learned.supernet import Gate, Masked
from embtab.learned.training import Data, Training
from embtab.training.data import DataModule
from embtab.training.setup import make_model
from embtab.training.task import RankingTask

QUICK: dict[str, dict[str, Any]] = {
    "magnitude": {"epochs": 2, "every": 3},
    "optembed": {"epochs": 2, "generations": 3, "mutations": 4, "crossovers": 3},
    "pep": {"epochs": 2, "every": 2},
    "dnis": {"warmup": 1, "epochs": 2},
}
METHODS: list[dict[str, Any]] = [{"name": name} | options for name, options in QUICK.items()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("learned") / "data"
    synthetic.prepare(folder, rows=3000, scale=0.0002, seed=1, multi=2)
    return str(folder)


def sweep_of(data: str, **changes: object) -> Sweep:
    tiny = {"name": "AutoInt", "attention_dim": 4, "num_layers": 1, "num_heads": 1, "dnn": [8], "dropout": 0.1}
    small = Sweep(data, ("x",), ("0.3x",), dim=8, model=tiny, epochs=2, batch_size=256, table_lr=0.1)
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def test_every_method_is_tried_here() -> None:
    assert set(QUICK) == set(LEARNED)


def test_dense_training_is_lightnings_number_by_number(data: str) -> None:
    sweep = sweep_of(data, weight_decay=0.01, epochs=3, patience=3)
    torch.set_num_threads(1)
    place = Data(sweep, 3, torch.device("cpu"))
    training = Training(sweep, place, Gate(), 3)
    training.fit(sweep.epochs, sweep.patience, lambda state: None, None)
    L.seed_everything(3, workers=True, verbose=False)
    tables = et.EmbeddingBagCollection(
        et.plan(place.features, "dense", None, sweep.dim),
        optimizer=et.Optimizer(lr=sweep.table_lr),
        init_std=sweep.init_std,
    )
    task = RankingTask(tables, make_model(sweep, len(place.dataset.dense), len(place.features)), weight_decay=0.01)
    trainer = L.Trainer(
        max_epochs=int(np.argmax([each["auc"] for each in training.history])) + 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, DataModule(data, sweep.batch_size, seed=3))
    (expected,) = trainer.test(task, DataModule(data, sweep.batch_size), verbose=False)
    single = {f"test/{name}": float(np.float32(value)) for name, value in training.evaluate("test").items()}
    # Lightning logs in single precision; the last place of a quotient of logarithms depends on the processor.
    assert single.pop("test/ne") == pytest.approx(expected.pop("test/ne"), rel=3e-7)
    assert single == expected


ARTEFACTS = ("masks.safetensors", "plan.json", "archive.csv", "archive.json", "result.json", "search.json")


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], tuple[Path, Result]]:
    """The folder and result of a method's search, run once."""
    done: dict[str, tuple[Path, Result]] = {}

    def found(method: dict[str, Any]) -> tuple[Path, Result]:
        if method["name"] not in done:
            folder = tmp_path_factory.mktemp(method["name"])
            done[method["name"]] = folder, run(sweep_of(data), method, "0.3x", 5, folder=folder)
        return done[method["name"]]

    return found


@every_method
def test_a_search_keeps_its_budget_and_is_exact(method: dict[str, Any], whole: Callable, data: str) -> None:
    folder, one = whole(method)
    assert one.plan.nbytes <= one.plan.budget == int(0.3 * one.plan.dense_nbytes)
    state = one.tables.state_dict()
    beside = (".optimizer", "_extra_state")
    assert one.plan.nbytes == sum(v.nbytes for name, v in state.items() if not name.endswith(beside))
    # Exactly what the masked supernet gives, for all ids.
    masks = load_file(folder / "masks.safetensors")
    joined = np.concatenate([masks[space.name] for space in one.plan.id_spaces])
    sweep, place = sweep_of(data), Data(sweep_of(data), 5, torch.device("cpu"))
    supernet = Training(sweep, place, Masked(torch.from_numpy(joined)), 5)
    supernet.load_weights(read(folder / "retrain.pt")["weights"])
    ids = single_ids({f.name: np.arange(max(map(len, masks.values()))) % f.num_ids for f in one.plan.features})
    with torch.no_grad():
        assert torch.equal(one.tables(ids).values(), supernet.tables.eval()(ids).values())
        for batch in place.batches("test"):  # bags of many ids, by another order of sums
            torch.testing.assert_close(one.tables(batch.sparse).values(), supernet.tables(batch.sparse).values())
    assert one.metrics["auc"] == pytest.approx(supernet.evaluate("test")["auc"], abs=1e-4)
    # Any bundle, any reader.
    assert torch.equal(et.load(folder / "bundle")(ids).values(), one.tables(ids).values())
    assert all(row["nbytes"] <= one.plan.dense_nbytes and 0 < row["auc"] < 1 for row in one.archive)
    assert any(row["pareto"] for row in one.archive)
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["training_nbytes"] > one.plan.dense_nbytes  # a supernet is larger than the tables it ends in


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from embtab.compare.sweep import Sweep
from embtab.learned import run, stages

real, left = stages.write, [0]

def write(path, state):
    real(path, state)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

stages.write = write
sweep, methods, folder = Sweep(**eval(sys.argv[1])), eval(sys.argv[2]), Path(sys.argv[3])
for method in methods:
    for at in (1, 3):  # files written before the kill: inside the first stage, then inside the next
        child = os.fork()
        if not child:
            left[0] = at
            run(sweep, method, "0.3x", 5, folder=folder / method["name"])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, method
        there = sorted(path.name for path in (folder / method["name"]).glob("*.pt"))
        print(method["name"], *there, flush=True)
"""


@pytest.fixture(scope="module")
def killed(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folders of searches that were killed three times each, and what was in them after each kill."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [repr(dataclasses.asdict(sweep_of(data))), repr(METHODS), str(folder)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


@every_method
def test_a_search_killed_in_any_stage_goes_on_to_the_same_result(
    method: dict[str, Any], whole: Callable, killed: tuple[Path, list[str]], data: str
) -> None:
    folder = killed[0] / method["name"]
    states = [line.split()[1:] for line in killed[1] if line.split()[0] == method["name"]]
    assert len(states) == 2
    assert all(any(name.endswith(".part.pt") for name in state) for state in states), states  # killed inside stages
    assert states[0] != states[1]
    resumed = run(sweep_of(data), method, "0.3x", 5, folder=folder)
    expected, one = whole(method)
    assert resumed.metrics == one.metrics
    assert not list(folder.glob("*.part.pt"))
    for file in ARTEFACTS:
        assert (folder / file).read_bytes() == (expected / file).read_bytes(), file


def test_finished_stages_are_not_done_again(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(data)
    monkeypatch.setattr(torch, "set_num_threads", asked := Mock(wraps=torch.set_num_threads))
    dense = train_dense(sweep, folder=tmp_path / "dense")
    first = run(sweep, "magnitude", "0.3x", folder=tmp_path, dense=dense)
    before = torch.get_num_threads()
    assert [call.args for call in asked.call_args_list] == [(1,), (before,)] * 2  # the caller keeps its threads
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["samples_in_dense_trainings"] == pytest.approx(cost["trained_samples"] / dense.trained_samples)
    assert cost["seconds_in_dense_trainings"] == pytest.approx(cost["seconds"] / dense.seconds)
    assert set(json.loads((tmp_path / "result.json").read_text())["dense"]) == set(first.metrics) - {
        "val_auc",
        "epochs",
    }
    monkeypatch.setattr(Training, "step", lambda *a: pytest.fail("trained again"))
    again = run(sweep, "magnitude", "0.3x", folder=tmp_path, dense=train_dense(sweep, folder=tmp_path / "dense"))
    assert again.metrics == first.metrics
    assert again.cost() == cost
    with pytest.raises(UserError, match=r"holds a search whose seed was 0 and is now 1"):
        run(sweep, "magnitude", "0.3x", seed=1, folder=tmp_path)
    (tmp_path / "retrain.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"retrain\.pt: damaged"):
        run(sweep, "magnitude", "0.3x", folder=tmp_path)


def test_a_stage_is_given_what_it_saved_last(tmp_path: Path) -> None:
    def stopped(save, resumed):
        save({"at": 1})
        save({"at": 2})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("s", stopped)
    assert Stages(tmp_path).run("s", lambda save, resumed: {"from": resumed["at"]}) == {"from": 2}
    assert Stages(tmp_path).run("s", lambda save, resumed: pytest.fail("done twice")) == {"from": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def one_class(data: str, folder: Path) -> str:
    """The data with only zeros in its validation labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from embtab.datasets.schema import Dataset, describe_files

    shutil.copytree(data, folder)
    for file in (folder / "valid").glob("*.parquet"):
        table = pq.read_table(file)
        at = table.schema.get_field_index("label")
        zeros = pa.array(np.zeros(len(table), np.float32))
        pq.write_table(table.set_column(at, table.schema.field("label"), zeros), file)
    dataclasses.replace(Dataset.load(Path(data)), files=describe_files(folder)).save(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("optembedd", "0.3x", "unknown learned method 'optembedd'; there are "),
        ({"name": "magnitude", "evry": 3}, "0.3x", "'magnitude' has no option 'evry'; it has epochs, start"),
        ({"name": "magnitude", "every": "often"}, "0.3x", "magnitude: every must be int, got 'often'"),
        ({"name": "magnitude", "end": 0.1}, "0.3x", "0 <= start < end <= 1 must hold"),
        ({"name": "magnitude", "by": "size"}, "0.3x", "by must be one of magnitude, impact"),
        ({"name": "magnitude", "epochs": 0}, "0.3x", "magnitude: epochs and every must be at least 1; got 0"),
        ({"name": "pep", "every": 0}, "0.3x", "pep: epochs and every must be at least 1"),
        ({"name": "pep", "threshold_lr": -1}, "0.3x", "threshold_lr must be zero or more"),
        ({"name": "pep", "retrain": "again"}, "0.3x", "retrain must be init or found; got 'again'"),
        ({"name": "pep", "threshold_lr": "fast"}, "0.3x", "threshold_lr must be float, got 'fast'"),
        ({"name": "dnis", "epochs": 0}, "0.3x", "epochs 1 or more"),
        ({"name": "optembed", "row_budget": 0.5}, "0.3x", "row_budget must be 0 or at least 1"),
        ({"name": "pep", "weight_decay": 0}, "0.3x", "decay alone raises thresholds"),
        ({"name": "optembed", "alpha": 0}, "0.3x", "alpha must be above zero"),
        ({"name": "pep", "thresholds": "row"}, "0.3x", "thresholds must be one of global"),
        ({"name": "dnis", "blocks": [0.5, 0.6]}, "0.3x", "add up to 1"),
        ({"name": "optembed", "generations": 0}, "0.3x", "generations must be at least 1"),
        ("magnitude", 7, "'magnitude' cannot fit into 7 B"),
        ("magnitude", "7 apples", "is not a size"),
    ],
)
def test_requests_that_make_no_sense_leave_nothing_behind(
    method: Any, budget: Any, message: str, data: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(sweep_of(data), method, budget, folder=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_infeasible_budget_says_what_is_feasible(data: str) -> None:
    with pytest.raises(et.InfeasibleBudget) as caught:
        run(sweep_of(data), "magnitude", 1)
    spaces = len(Data(sweep_of(data), 0, torch.device("cpu")).features)
    assert caught.value.min_bytes == 4 * spaces


def test_a_validation_split_of_one_class_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the validation split has only rows of label 0, so it has no AUC"):
        run(sweep_of(one_class(data, tmp_path / "zeros")), "magnitude", "0.3x")


def test_blocks_by_frequency_need_counts(data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "vocab")
    with pytest.raises(UserError, match=r"dnis: blocks of ids by frequency need to know how often each id of feature"):
        run(sweep_of(str(tmp_path / "data")), "dnis", "0.3x", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ({**QUICK["optembed"], "name": "optembed", "row_budget": 1.5, "epochs": 1}, "fp32"),
        ({**QUICK["magnitude"], "name": "magnitude", "by": "impact", "epochs": 1}, "fp16"),
        ({**QUICK["pep"], "name": "pep", "by": "impact", "retrain": "found", "epochs": 1}, "int8"),
    ],
    ids=lambda each: each if isinstance(each, str) else each["name"],
)
def test_a_small_budget_is_kept_in_every_precision(method: dict[str, Any], precision: str, data: str) -> None:
    one = run(sweep_of(data, epochs=1), method, "0.1x", precision=precision)
    assert one.plan.nbytes <= one.plan.budget == int(0.1 * one.plan.dense_nbytes)
    assert all(table.precision == precision for table in one.plan.tables.values())
    assert 0 < one.metrics["auc"] < 1
    if method["name"] == "optembed":  # rows were dropped, and those that are left are within what was asked for
        kept = sum(table.num_rows for table in one.plan.tables.values() if table.width > 1)
        assert 0 < kept * sweep_of(data).dim * 4 <= 1.5 * one.plan.budget


def test_the_pareto_front_by_hand() -> None:
    sizes_and_aucs = [(10, 0.5), (20, 0.7), (20, 0.6), (30, 0.7), (30, 0.8), (5, 0.5)]
    archive = with_pareto([{"nbytes": n, "auc": a} for n, a in sizes_and_aucs])
    assert [row["pareto"] for row in archive] == [False, True, False, False, True, True]
