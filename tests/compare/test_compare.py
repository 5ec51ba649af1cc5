"""A sweep runs each cell once, resumes to the cell, says what cannot be done, and reports what was measured."""

import csv
import dataclasses
import json
import multiprocessing
import os
import statistics
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import embtab.compare.report
import embtab.compare.train
import embtab.compare.workers
from embtab.compare import run as sweeps
from embtab.compare.report import markdown
from embtab.compare.run import seconds_left
from embtab.compare.statistics import mean_interval
from embtab.compare.sweep import Sweep, read_sweep
from embtab.compare.workers import Job, outcomes
from embtab.datasets import synthetic
from embtab.errors import UserError
from embtab.features import read_features
from embtab.files import locked
from embtab.planning import plan
from embtab.planning.specs import label
from embtab.quantise import served
from embtab.tables import EmbeddingBagCollection


def compare(sweep: Sweep, out: Path, jobs: int = 1) -> str:
    return markdown(sweeps.compare(sweep, out, jobs))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compare") / "data"
    synthetic.prepare(folder, rows=3000, scale=0.0002, seed=1)
    return str(folder)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second for every report; test_report.py looks at them."""
    monkeypatch.setattr(embtab.compare.report, "pictures", lambda report: {})


def sweep_of(data: str, **changes: object) -> Sweep:
    tiny = {"name": "AutoInt", "attention_dim": 4, "num_layers": 1, "num_heads": 1, "dnn": []}
    small = Sweep(data, ("dense", "hash", "unified"), ("1x", "0.3x"), (0,), dim=4, model=tiny, batch_size=512)
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def rows_in(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_measures_every_cell_and_never_one_twice(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    real = embtab.compare.train.train

    def counting(sweep, plans, seed, show=False):
        trained.append(f"{sorted(plans)} {seed}")
        return real(sweep, plans, seed, show)

    monkeypatch.setattr(embtab.compare.train, "train", counting)
    report = compare(sweep_of(data), tmp_path)
    written = rows_in(tmp_path)
    rows = {(row["method"], row["budget"]): row for row in written if row["precision"] == "fp32"}
    assert set(rows) == {("dense", "none")} | {(m, b) for m in ("hash", "unified") for b in ("1x", "0.3x")}
    # At 1x nothing is compressed: those cells are the dense run. It is measured in int8, too, and trained once.
    assert len(trained) == 3
    (rounded,) = [row for row in written if row["precision"] == "int8"]
    assert (rounded["method"], rounded["samples_per_s"]) == ("dense", rows["dense", "none"]["samples_per_s"])
    assert 0 < abs(float(rounded["auc"]) - float(rows["dense", "none"]["auc"])) < 0.01
    assert rows["hash", "1x"]["auc"] == rows["unified", "1x"]["auc"] == rows["dense", "none"]["auc"]
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 < float(row["auc"]) < 1
        assert sum(json.loads(row["bytes_by_part"]).values()) == int(row["nbytes"])
        assert not row["budget_bytes"] or int(row["nbytes"]) <= int(row["budget_bytes"])
    assert f"{float(rows['hash', '0.3x']['auc']):.4f}" in report
    assert "(Bayes)" in report
    # Again: nothing is left to do, and the report is the same.
    assert compare(sweep_of(data), tmp_path) == report
    assert len(trained) == 3
    # A further seed runs only its own cells.
    grown = compare(sweep_of(data, seeds=(0, 1)), tmp_path)
    assert len(trained) == 6
    both = [float(row["auc"]) for row in rows_in(tmp_path) if (row["method"], row["budget"]) == ("hash", "0.3x")]
    assert f"| {statistics.mean(both):.4f} | {mean_interval(both).low:.4f} to {mean_interval(both).high:.4f} |" in grown


def test_rows_are_rounded_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows are moved again by a second rounding, so validation and test would not see the same tables."""
    measured: dict[str, torch.Tensor] = {}

    def kept(tables: EmbeddingBagCollection) -> dict[str, list[int]]:
        rows = [tables.lookup.table(name).flatten() for name in tables.plan.tables]
        measured[tables.plan.precision] = torch.cat(rows)
        return {}

    monkeypatch.setattr(embtab.compare.train.measure, "collisions", kept)
    sweep = sweep_of(data, init_std=1e-3, table_lr=1e-5, dim=16)
    plans = {name: plan(read_features(data), "dense", None, 16, precision=name) for name in ("fp32", "int8")}
    embtab.compare.train.train(sweep, plans, seed=0)
    once = served(measured["fp32"].unflatten(0, (-1, 16)), "int8")
    assert not torch.equal(served(once, "int8"), once)
    assert torch.equal(measured["int8"], once.flatten())


def test_processes_side_by_side_give_the_same_results(data: str, tmp_path: Path) -> None:
    compare(sweep_of(data), tmp_path / "one", jobs=1)
    compare(sweep_of(data), tmp_path / "two", jobs=2)

    def results(folder: str) -> dict[str, str]:
        return {row["method"] + row["precision"] + row["budget"]: row["auc"] for row in rows_in(tmp_path / folder)}

    assert results("one") == results("two")


def test_rows_say_the_precision_of_their_tables(data: str, tmp_path: Path) -> None:
    own = ({"name": "hash", "precision": "int8"}, "auto")
    sweep = sweep_of(data, methods=own, budgets=("0.2x", "4 B"), precisions=("fp32", "fp16"))
    report = compare(sweep, tmp_path)
    written = [(row["method"], row["budget"], row["status"], row["precision"]) for row in rows_in(tmp_path)]
    assert sorted(written) == [  # one row each, though two precisions are asked for
        ("auto", "0.2x", "ok", plan(read_features(data), "auto", "0.2x", 4).precision),
        ("auto", "4 B", "infeasible", "any precision"),
        ("hash precision=int8", "0.2x", "ok", "int8"),
        ("hash precision=int8", "4 B", "infeasible", "any precision"),
    ]
    assert "auto, any precision, 4 B: infeasible" in report


def test_infeasible_cells_say_so_and_the_rest_goes_on(data: str, tmp_path: Path) -> None:
    report = compare(sweep_of(data, methods=("qr", "hash"), budgets=("0.05x",)), tmp_path)
    rows = {row["method"]: row for row in rows_in(tmp_path)}
    assert rows["hash"]["status"] == "ok"
    assert rows["qr"]["status"] == "infeasible"
    assert int(rows["qr"]["min_bytes"]) > 0
    assert "infeasible, needs" in report


def test_a_failing_cell_is_recorded_and_tried_again(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = embtab.compare.train.train

    def failing(sweep, plans, seed, show=False):
        if any(e.method == "hash" for plan in plans.values() for e in plan.encodings.values()):
            raise RuntimeError("the disk\nis full")
        return real(sweep, plans, seed, show)

    monkeypatch.setattr(embtab.compare.train, "train", failing)
    sweep = sweep_of(data, methods=("hash", "unified"), budgets=("0.3x",))
    with pytest.raises(UserError, match=r"1 of 2 runs failed .*hash, 0.3x, seed 0: RuntimeError: the disk is full"):
        compare(sweep, tmp_path)
    assert {row["method"]: row["status"] for row in rows_in(tmp_path)} == {"hash": "failed", "unified": "ok"}
    monkeypatch.setattr(embtab.compare.train, "train", real)
    compare(sweep, tmp_path)
    assert {row["status"] for row in rows_in(tmp_path)} == {"ok"}


def test_every_ranker_has_its_own_cells_and_section(data: str, tmp_path: Path) -> None:
    models = ({"name": "AutoInt", "num_layers": 0, "dnn": [4]}, {"name": "AutoInt", "num_layers": 0, "dnn": []})
    report = compare(sweep_of(data, methods=("dense", "hash"), budgets=("0.3x",), model=models), tmp_path)
    rows = rows_in(tmp_path)
    assert [json.loads(row["training"])["model"]["dnn"] for row in rows] == [[4]] * 3 + [[]] * 3
    assert len({row["auc"] for row in rows if row["method"] == "hash"}) == 2
    assert "# AutoInt dnn=\\[4\\] num_layers=0\n" in report
    assert "# AutoInt dnn=\\[\\] num_layers=0\n" in report
    typed = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["auc"] for row in typed] == [float(row["auc"]) for row in rows]
    assert [row["nbytes"] for row in typed] == [int(row["nbytes"]) for row in rows]


def die(sweep, plans, seed, show=False):
    """Stands for a process that the system kills: hashed tables end it, others have a result."""
    if any(e.method == "hash" for plan in plans.values() for e in plan.encodings.values()):
        os._exit(9)
    return {name: {"auc": 0.5} for name in plans}


def test_a_process_that_dies_is_found_and_the_others_have_their_results(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embtab.compare.train, "train", die)
    monkeypatch.setattr(embtab.compare.workers, "get_context", lambda kind: multiprocessing.get_context("fork"))
    features = read_features(data)
    jobs = {
        name: Job(sweep_of(data), {f"{name} key": plan(features, name, "0.3x", 4)}, 0)
        for name in ("unified", "hash", "qr", "memcom")
    }
    found = {key: next(iter(rows.values())) for key, _, rows in outcomes(jobs, 2)}
    assert set(found) == set(jobs)
    assert {key: row["status"] for key, row in found.items()} == dict.fromkeys(jobs, "ok") | {"hash": "failed"}
    assert found["hash"]["error"] == "the process died; did it run out of memory?"


def test_the_time_that_is_left() -> None:
    assert seconds_left([10.0, 20.0], runs=4, jobs=1) == 60
    assert seconds_left([10.0, 20.0], runs=4, jobs=2) == 30
    assert seconds_left([10.0, 20.0], runs=1, jobs=8) == 15  # the last run takes as long as any
    assert seconds_left([10.0], runs=0, jobs=2) == 0


def test_two_processes_do_not_write_to_one_folder(data: str, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another process is writing here"):
        compare(sweep_of(data), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [dense]\nbudgets: [1x]", "key 'data' is missing"),
        ("data: d\nmethods: [dense]\nbudgets: [1x]\nbudgts: 3", "unknown key 'budgts'; there are data, dim, model"),
        ("data: d\nmethods: []\nbudgets: [1x]", "methods must be a list with at least one entry"),
        ("data: d\nmethods: [dense]\nbudgets: [1x]\nepochs: many", "epochs must be int, got 'many'"),
        ("data: d\nmethods: [dense]\nbudgets: [1x]\nepochs: 0", "epochs must be at least 1"),
        ("data: d\nmethods: [dense]\nbudgets: [1x]\nseeds: [a]", "seeds must be whole numbers"),
        ("- a list", "expected keys such as data"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(file)
    assert "\n" not in str(caught.value)


def test_numbers_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("data: d\nmethods: [{name: qr, op: sum}]\nbudgets: [8MB]\nlr: 1e-3")
    sweep = read_sweep(file, seeds=[4])
    assert (sweep.lr, sweep.seeds) == (0.001, (4,))
    assert [label(cell.method) for cell in sweep.cells()] == ["qr op=sum"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ("8 apples",)}, "'8 apples' is not a size"),
        ({"budgets": (0,)}, "must be above zero"),
        ({"methods": ("magic",)}, "unknown method 'magic'"),
        ({"methods": ({"name": "qr", "opp": "sum"},)}, "has no option 'opp'"),
        ({"precisions": ("int3",)}, "unknown precision 'int3'"),
        ({"seeds": (0, -1)}, "seeds must be whole numbers from 0"),
        ({"seeds": (2**32,)}, "seeds must be whole numbers from 0"),
        ({"lr": -1.0}, "lr must be a finite number, above zero"),
        ({"init_std": -1.0}, "init_std must be a finite number, zero or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, zero or more"),
        ({"table_optimizer": "adam"}, "must be one of sgd, adagrad"),
        ({"model": {"name": "Magic"}}, "unknown model 'Magic'"),
        ({"model": {"name": "AutoInt", "heads": 2}}, "model AutoInt has no option 'heads'"),
    ],
)
def test_a_sweep_that_makes_no_sense_leaves_nothing_behind(
    data: str, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare(sweep_of(data, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
