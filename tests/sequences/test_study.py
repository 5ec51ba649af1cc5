"""Comparisons of sequence models: bytes and budgets, resuming, the report, and mistakes by name."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from embtab import cli
from embtab.compare.statistics import difference, half_width, mean_interval
from embtab.datasets import long_histories
from embtab.datasets.schema import Dataset
from embtab.errors import InfeasibleBudget, UserError
from embtab.features import read_features
from embtab.planning import plan
from embtab.sequences import run
from embtab.sequences.plot import points
from embtab.sequences.report import report
from embtab.sequences.study import Study, read_study
from embtab.sequences.train import cell_bytes, make_plans, make_task, table_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
ARMS = {
    "mean": {"model": "MeanPool"},
    "twin": {"model": "DARE", "top_k": 5},
    "dare": {"model": "DARE", "top_k": 5, "attention": {"dim": 4, "share": 0.3, "precision": "int8", "init_std": 1.0}},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "data"
    long_histories.prepare(out, users=60, min_length=5, max_length=15, items=60, interests=6, per_user=3)
    return out


def described(data: Path, **more) -> dict:
    settings = {"task": "sequences", "data": str(data), "arms": ARMS, "dim": 8, "epochs": 2, "head": {"hidden": [8]}}
    return settings | {"seeds": [0, 1]} | more


def study(data: Path, folder: Path, **more) -> Study:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(described(data, **more), sort_keys=False))
    return read_study(file)


def test_budgets_are_of_all_tables_together_and_shared_out(planted, tmp_path):
    made = study(planted, tmp_path, methods=["hash", "qr"], budgets=["0.9x", "0.6x"])
    dense = plan(read_features(planted), dim=8).nbytes
    for cell in made.cells():
        total = cell_bytes(made, cell)
        assert total == int(dense * float(cell.budget[:-1]))
        plans = make_plans(made, cell)
        assert sum(each.nbytes for each in plans) <= total
        if cell.arm.name == "dare":
            representation, attention = plans
            assert attention.nbytes <= attention.budget == int(total * 0.3)
            assert (attention.dim, attention.precision, representation.dim) == (4, "int8", 8)
        task = make_task(made, cell)
        assert table_bytes(task)["nbytes"] == sum(each.nbytes for each in plans)
        assert task.tables.plan.to_dict() == plans[0].to_dict()
        if cell.arm.name == "dare":
            assert task.attention.plan.to_dict() == plans[1].to_dict()


def test_the_attention_may_start_wider(planted, tmp_path):
    cell = next(cell for cell in study(planted, tmp_path).cells() if cell.arm.name == "dare")
    task = make_task(study(planted, tmp_path), cell)
    assert 0.8 < task.attention.lookup.table("items").std() < 1.2
    assert 0.08 < task.tables.lookup.table("items").std() < 0.12


def test_a_study_resumes_where_it_was_left_and_reports_its_means(planted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    config, out = tmp_path / "study.yaml", tmp_path / "report"
    settings = described(planted, methods=["dense", "hash"], budgets=["0.001x"])
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    trained = []
    train = run._trained

    def stopping(study, cell, key):
        trained.append((cell.arm.name, cell.seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(study, cell, key)

    monkeypatch.setattr(run, "_trained", stopping)
    with pytest.raises(SystemExit):
        cli.main(["compare", "--config", str(config), "--out", str(out)])
    assert len(run.read_results(out / "results.csv")) == 3 + 6  # and what is infeasible
    cli.main(["compare", "--config", str(config), "--out", str(out)])
    assert trained == [(name, seed) for seed in (0, 1) for name in ARMS][:4] + [
        (name, 1) for name in ARMS
    ]  # the fourth again, and none of the first three
    shown = capsys.readouterr().out
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ok = [row for row in rows if row["status"] == "ok"]
    assert len(rows) == 12
    assert {row["arm"] for row in ok if row["search_ndcg"]} == {"twin", "dare"}
    interval = mean_interval([float(row["auc"]) for row in ok if row["arm"] == "dare"])
    assert f"{interval.mean:.4f} ± {interval.high - interval.mean:.4f}" in shown
    gaps = [float(b["auc"]) - float(a["auc"]) for a, b in zip(ok[::3], ok[2::3], strict=True)]
    assert f"{np.mean(gaps):+.4f}" in shown
    assert "infeasible" in shown
    assert (out / "report.md").read_text() in shown
    assert (out / "auc.png").read_bytes()[:4] == b"\x89PNG"
    drawn = points(list(run.read_results(out / "results.csv").values()))
    assert list(drawn) == [("dense", name) for name in ARMS]
    assert drawn["dense", "dare"] == [(int(ok[2]["nbytes"]), interval.mean, interval.high - interval.mean)]


def test_a_cell_is_known_by_what_it_does_not_by_its_name(planted, tmp_path):
    one = study(planted, tmp_path)
    renamed = study(planted, tmp_path, arms={"other": ARMS["dare"]})
    longer = study(planted, tmp_path, epochs=3)
    keys = [[each.key(cell, "") for cell in each.cells()] for each in (one, renamed, longer)]
    assert set(keys[1]) < set(keys[0])
    assert not set(keys[0]) & set(keys[2])
    assert len(set(keys[0])) == len(keys[0]) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"arms": {"a": {"model": "Din"}}}, "arm 'a': needs a model of MeanPool, DIN, DARE"),
        ({"arms": {"a": {"model": "DIN", "top_k": 3}}}, "DIN has no option 'top_k'"),
        ({"arms": {"a": {"model": "DARE", "attention": {"size": 3}}}}, "attention has no setting 'size'"),
        ({"arms": {"a": {"model": "DARE", "attention": {"share": 1}}}}, r"must lie in \(0, 1\)"),
        ({"arms": {"a": {"model": "DIN", "attention": {"dim": 2}}}}, "DIN has no use for attention"),
        ({"arms": {}}, "'arms' is missing"),
        ({"reference": "x"}, "reference 'x' is no arm"),
        ({"epoch": 1}, "unknown key 'epoch'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": "fast"}, "lr must be float"),
        ({"seeds": 3}, "seeds must be a list"),
    ],
)
def test_mistakes_are_named(planted, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        study(planted, tmp_path, **more)


@pytest.mark.parametrize(
    ("text", "message"), [("arms: [", "cannot be read as YAML"), ("- arms", "expected keys such as")]
)
def test_files_that_are_no_study_are_named(tmp_path, text, message):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"study\.yaml: {message}"):
        read_study(file)


def test_nothing_is_left_behind_by_a_study_that_makes_no_sense(planted, tmp_path):
    out = tmp_path / "report"
    for more in ({"methods": ["hush"], "budgets": ["0.1x"]}, {"leave_out": ["x"]}, {"methods": ["hash"]}):
        with pytest.raises(UserError):
            run.run_study(study(planted, tmp_path, **more), out)
    assert not out.exists()
    made = study(planted, tmp_path, methods=["hash"], budgets=["0.001x"])
    with pytest.raises(InfeasibleBudget):
        make_plans(made, next(made.cells()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seeds": [0, -1]}, "seeds must be whole numbers from 0"),
        ({"lr": -1}, "lr must be a finite number, above zero"),
        ({"init_std": -1}, "init_std must be a finite number, zero or more"),
        ({"weight_decay": "nan"}, "weight_decay must be a finite number"),
        ({"l2": -0.1}, "l2 must be"),
        ({"table_lr": -1}, "table optimizer: lr must"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_before_anything_is_written(planted, tmp_path, more, said):
    out = tmp_path / "report"
    with pytest.raises(UserError, match=said):
        run.run_study(study(planted, tmp_path, **more), out)
    assert not out.exists()


def test_a_run_that_fails_is_noted_and_the_others_go_on(planted, tmp_path, monkeypatch):
    out = tmp_path / "report"
    made = study(planted, tmp_path, seeds=[0], epochs=1, arms={"a <b>": ARMS["mean"], "twin": ARMS["twin"]})
    train = run._trained

    def failing(made, cell, key):
        if cell.arm.name != "twin":
            raise ValueError("no |\nluck")
        return train(made, cell, key)

    monkeypatch.setattr(run, "_trained", failing)
    with pytest.raises(UserError, match=r"1 of 2 runs failed .* first a <b>, dense, no budget, seed 0: ValueError: no"):
        run.run_study(made, out)
    rows = list(run.read_results(out / "results.csv").values())
    assert sorted(row["status"] for row in rows) == ["failed", "ok"]
    assert len(next(row["auc_resampled"] for row in rows if row["status"] == "ok")) == 200
    monkeypatch.setattr(run, "_trained", train)
    run.run_study(made, out)
    assert {row["status"] for row in run.read_results(out / "results.csv").values()} == {"ok"}


def row(arm, seed, auc, resampled):
    texts = {"status": "ok", "arm": arm, "method": "dense", "budget": "none", "auc_resampled": resampled}
    return dict.fromkeys(run.COLUMNS) | texts | {"seed": seed, "auc": auc, "nbytes": 8, "seconds": 1.0}


def test_a_difference_holds_both_chances(planted, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.004, 200)
    rows = [row("mean", seed, 0.7, [0.7] * 200) for seed in range(3)]
    rows += [row("twin", seed, 0.71 + 0.001 * seed, (0.71 + noise).tolist()) for seed in range(3)]
    gap = difference(*({r["seed"]: r["auc"] for r in each} for each in (rows[3:], rows[:3])))
    whole = half_width(0.001**2 / 3, float(np.var(noise, ddof=1)), 3)
    shown = report(study(planted, tmp_path), Dataset.load(planted), rows)
    assert f"+0.0110 ± {whole:.4f}" in shown
    assert whole > 1.9 * 0.004 > gap.seeds.high - gap.seeds.mean


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("compare_sequences_*.yaml")), ids=lambda file: file.stem)
def test_configurations_can_be_read(file):
    assert list(read_study(file).cells())
