"""Tables that search their shape are cells like the others: measured alike, done once, cost in its own columns."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from compare.results_made_up import made_up_rows

import embtab.compare.report
from embtab.bundle import load
from embtab.compare import run as sweeps
from embtab.compare.report import markdown
from embtab.compare.results import COSTS, read_results, write_results
from embtab.compare.searched import search_key
from embtab.compare.sweep import Cell, Sweep
from embtab.datasets import synthetic
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.learned import run, stages
from embtab.learned.training import Training

MAGNITUDE = {"name": "magnitude", "epochs": 1, "every": 3}
OPTEMBED = {"name": "optembed", "epochs": 1, "generations": 1, "mutations": 2, "crossovers": 1}


def compare(sweep: Sweep, out: Path, jobs: int = 1) -> str:
    return markdown(sweeps.compare(sweep, out, jobs))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("searched") / "data"
    synthetic.prepare(folder, rows=2000, scale=0.0002, seed=1)
    return str(folder)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embtab.compare.report, "pictures", lambda report: {})


def sweep_of(data: str, **changes: object) -> Sweep:
    tiny = {"name": "AutoInt", "attention_dim": 4, "num_layers": 1, "num_heads": 1, "dnn": []}
    small = Sweep(data, ("dense", MAGNITUDE, OPTEMBED), ("0.4x",), (0,), dim=4, model=tiny, batch_size=500)
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def rows_in(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return {row["method"].split()[0]: row for row in csv.DictReader(file) if row["precision"] == "fp32"}


def test_searches_are_measured_like_the_others_and_done_once(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(data)
    report = compare(sweep, tmp_path)
    rows = rows_in(tmp_path)
    assert list(rows) == ["dense", "magnitude", "optembed"]
    per_epoch = Dataset.load(data).rows("train")
    for method in (MAGNITUDE, OPTEMBED):
        row = rows[str(method["name"])]
        assert all(row[name] for name in rows["dense"] if rows["dense"][name])  # whatever is measured of dense tables
        assert sum(json.loads(row["bytes_by_part"]).values()) == int(row["nbytes"]) <= int(row["budget_bytes"])
        alone = run(sweep, method, "0.4x", folder=tmp_path / "searches" / row["key"])
        assert float(row["auc"]) == pytest.approx(alone.metrics["auc"], abs=1e-9)
        assert (
            int(row["nbytes"]) == alone.plan.nbytes == load(tmp_path / "searches" / row["key"] / "bundle").plan.nbytes
        )
        assert (int(row["trained_samples"]), int(row["training_nbytes"])) == (
            alone.trained_samples,
            alone.training_nbytes,
        )
        assert 0 < float(row["search_seconds"]) < float(row["seconds"])
        assert int(row["training_nbytes"]) > int(rows["dense"]["training_nbytes"]) > int(row["dense_nbytes"])
        ratio = int(row["trained_samples"]) / per_epoch
        assert f"| {ratio:.2f} |" in report.split("## What the search cost")[1]
    assert rows["dense"]["search_seconds"] == ""
    assert int(rows["dense"]["trained_samples"]) == per_epoch
    # Once more: nothing is trained, and the report is the same.
    monkeypatch.setattr(Training, "step", lambda *a: pytest.fail("trained again"))
    assert compare(sweep, tmp_path) == report


def test_a_search_that_was_stopped_goes_on_inside_its_cell(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(data, methods=(OPTEMBED,))
    compare(sweep, tmp_path / "whole")
    real = stages.write

    def stopping(path: Path, state: dict[str, Any]) -> None:
        real(path, state)
        if path.name == "supernet.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(sweep, tmp_path / "stopped")
    monkeypatch.setattr(stages, "write", real)
    steps = []
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self, batch: steps.append(self.gate) or step(self, batch))
    compare(sweep, tmp_path / "stopped", jobs=1)
    assert {type(gate).__name__ for gate in steps} == {"Masked"}  # the supernet is not trained again
    whole, stopped = (rows_in(tmp_path / name)["optembed"] for name in ("whole", "stopped"))
    for name in ("key", "auc", "val_auc", "nbytes", "bytes_by_part", "trained_samples", "collisions"):
        assert whole[name] == stopped[name]


def test_a_key_is_what_decides_the_result(data: str) -> None:
    sweep, cell = sweep_of(data), Cell("magnitude", "0.4x", "fp32", 0)
    key = search_key(sweep, cell)
    assert search_key(sweep, dataclasses.replace(cell, method={"name": "magnitude", "every": 50})) == key  # the default
    in_bytes = Dataset.load(data).features
    dense = 4 * sweep.dim * sum(feature.num_ids for feature in in_bytes)
    assert search_key(sweep, dataclasses.replace(cell, budget=int(0.4 * dense))) == key
    others = [
        (sweep, dataclasses.replace(cell, method={"name": "magnitude", "by": "impact"})),
        (sweep, dataclasses.replace(cell, method="pep")),
        (sweep, dataclasses.replace(cell, budget="0.3x")),
        (sweep, dataclasses.replace(cell, precision="int8")),
        (sweep, dataclasses.replace(cell, seed=1)),
        (sweep_of(data, dim=8), cell),
        (sweep_of(data, table_lr=0.1), cell),
    ]
    assert len({key, *(search_key(*other) for other in others)}) == 1 + len(others)


def test_infeasible_searches_are_recorded_whenever_they_are_found_so(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 bytes hold nothing, as is known at once; 4000 hold no row of width 1 of each id, as the supernet tells.
    sweep = sweep_of(data, methods=(OPTEMBED,), budgets=(20, 4000))
    report = compare(sweep, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {row["budget"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in rows.values()] == ["infeasible"] * 2
    assert 20 < int(rows["20"]["min_bytes"]) < 4000 < int(rows["4000"]["min_bytes"])
    assert [path.name for path in (tmp_path / "searches").iterdir()] == [rows["4000"]["key"]]
    assert report.count("infeasible, needs") == 2
    monkeypatch.setattr(Training, "step", lambda *a: pytest.fail("trained again"))
    assert compare(sweep, tmp_path) == report


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "magnitude", "evry": 3}, "'magnitude' has no option 'evry'"),
        ({"name": "optembed", "alpha": 0}, "alpha must be above zero"),
    ],
)
def test_mistakes_leave_nothing_behind(method: dict[str, Any], message: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compare(sweep_of(data, methods=("dense", method)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_from_before_costs_were_counted_are_read(tmp_path: Path) -> None:
    rows = made_up_rows()
    write_results(tmp_path / "new.csv", rows)
    with (tmp_path / "new.csv").open(newline="") as new, (tmp_path / "old.csv").open("w", newline="") as old:
        reader = csv.DictReader(new)
        writer = csv.DictWriter(
            old, [name for name in reader.fieldnames or () if name not in COSTS], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(reader)
    assert read_results(tmp_path / "old.csv") == read_results(tmp_path / "new.csv")
