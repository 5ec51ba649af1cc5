"""Every command that takes method="auto" takes the same tables for the same data, method and budget."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

import embtab as et
from embtab.bench.lookups import make_tables
from embtab.bench.workload import Case
from embtab.cli import main
from embtab.compare.run import _planned
from embtab.compare.sweep import Sweep
from embtab.datasets import long_histories, synthetic
from embtab.datasets.schema import Dataset
from embtab.reader import Bundle
from embtab.sequences.study import read_study
from embtab.sequences.train import make_plans, make_task
from embtab.training.sequence_task import FitSequenceTask
from embtab.training.task import FitTask

BUDGET = "0.25x"  # of dense tables: int4 rows fit, float32 rows do not


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rows") / "data"
    synthetic.prepare(out, rows=400, scale=1e-4, seed=1)
    return out


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("histories") / "data"
    long_histories.prepare(out, users=60, min_length=5, max_length=15, items=60, interests=6, per_user=3)
    return out


def wanted(data: Path) -> dict:
    made = et.plan(et.read_features(data), "auto", BUDGET, dim=16)
    assert {encoding.method for encoding in made.encodings.values()} == {"dense"}
    assert "int4" in {table.precision for table in made.tables.values()}
    return made.to_dict()


def test_plan_says_it(rows: Path, histories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in (rows, histories):
        assert main(["plan", str(data), "--method", "auto", "--budget", BUDGET]) is None
        assert capsys.readouterr().out.strip() == et.plan(et.read_features(data), "auto", BUDGET).describe()


def test_fit_trains_it(rows: Path, histories: Path) -> None:
    assert FitTask(str(rows), "auto", BUDGET).tables.plan.to_dict() == wanted(rows)
    assert FitSequenceTask(str(histories), "auto", BUDGET).tables.plan.to_dict() == wanted(histories)


def test_compare_trains_it(rows: Path, histories: Path, tmp_path: Path) -> None:
    sweep = Sweep(str(rows), methods=("auto",), budgets=(BUDGET,), seeds=(0,))
    (cell,) = sweep.cells()
    planned = _planned(sweep, Dataset.load(rows), et.read_features(rows), cell).plan
    assert planned is not None
    assert planned.to_dict() == wanted(rows)
    config = {"task": "sequences", "data": str(histories), "arms": {"din": {"model": "DIN"}}, "seeds": [0]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config | {"methods": ["auto"], "budgets": [BUDGET]}))
    study = read_study(tmp_path / "study.yaml")
    (one,) = study.cells()
    made = [plan.to_dict() | {"budget": None} for plan in (*make_plans(study, one), make_task(study, one).tables.plan)]
    assert made == [wanted(histories) | {"budget": None}] * 2


def test_the_attentions_own_tables_are_chosen_alike(histories: Path) -> None:
    from embtab.models import DARE

    task = FitSequenceTask(str(histories), attention={"method": "auto", "budget": BUDGET}, model=DARE)
    assert "int4" in {table.precision for table in task.attention.plan.tables.values()}


def test_a_bundle_holds_it(rows: Path, histories: Path, tmp_path: Path) -> None:
    for data, task in ((rows, FitTask), (histories, FitSequenceTask)):
        et.save(task(str(data), "auto", BUDGET).tables, tmp_path / data.parent.name)
        assert Bundle(tmp_path / data.parent.name).plan == wanted(data)


def test_import_makes_it(rows: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = {each.name: rng.normal(size=(each.num_ids, 16)).astype(np.float32) for each in et.read_features(rows)}
    save_file(dense, tmp_path / "dense.safetensors")
    given = ["import", tmp_path / "dense.safetensors", "--data", rows, "--out", tmp_path / "bundle"]
    main([*map(str, given), "--method", "auto", "--budget", BUDGET])
    made = Bundle(tmp_path / "bundle").plan
    assert {table["name"]: table["precision"] for table in made["tables"]} == {
        table["name"]: table["precision"] for table in wanted(rows)["tables"]
    }


def test_bench_times_it() -> None:
    case = Case(dim=4, batch=8, cap=50)
    tables = make_tables("auto", case, "0.5x", "sgd", torch.device("cpu")).module
    assert tables.plan.to_dict() == et.plan(case.features, "auto", "0.5x", 4).to_dict()
    assert tables.plan.precision != "fp32"
