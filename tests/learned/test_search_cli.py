"""embtab search: a folder per search, one dense training a seed, a report; infeasible searches say so."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from embtab.cli import main
from embtab.datasets import synthetic
from embtab.learned.training import Training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    synthetic.prepare(folder / "data", rows=2000, scale=0.0002, seed=1)
    settings = {
        "data": str(folder / "data"),
        "methods": [
            {"name": "magnitude", "epochs": 1, "every": 3},
            {"name": "optembed", "epochs": 1, "generations": 1},
        ],
        "budgets": ["0.4x", 4000],
        "seeds": [0],
        "dim": 4,
        "model": {"name": "AutoInt", "attention_dim": 4, "num_layers": 1, "num_heads": 1, "dnn": []},
        "epochs": 1,
        "batch_size": 500,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(settings))
    return folder / "search.yaml"


def test_a_search_from_the_command_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(["search", "--config", str(config), "--out", str(out)])
    report = capsys.readouterr().out
    assert report == (out / "report.md").read_text()
    with (out / "results.csv").open(newline="") as file:
        rows = {(row["method"].split()[0], row["budget"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    # 4000 bytes are too few for rows of width 1, and enough for magnitude pruning.
    assert rows["optembed", "4000"]["status"].startswith("infeasible: needs ")
    done = [row for row in rows.values() if row["status"] == "ok"]
    assert len(done) == 3
    for row in done:
        folder = out / row["folder"]
        found = json.loads((folder / "result.json").read_text())
        assert found["nbytes"] == int(row["nbytes"]) <= found["budget"]
        assert found["metrics"]["auc"] == float(row["auc"])
        assert float(row["samples_in_dense_trainings"]) > 0
        assert (folder / "bundle" / "config.json").is_file()
        assert f"{float(row['auc']):.4f}" in report
    assert len(list(out.glob("dense-seed*"))) == 1
    # Once more: nothing is trained again, and the report is the same.
    monkeypatch.setattr(Training, "step", lambda *a: pytest.fail("trained again"))
    main(["search", "--config", str(config), "--out", str(out)])
    assert capsys.readouterr().out == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["qr"]}, "unknown learned method 'qr'; there are magnitude, optembed, pep, dnis"),
        ({"model": [{"name": "AutoInt"}, {"name": "AutoInt"}]}, "takes one model"),
        ({"model": {"name": "AutoOut"}}, "unknown model 'AutoOut'"),
        ({"budgets": [20]}, "cannot fit into 20 B"),
    ],
)
def test_mistakes_are_one_line(
    change: dict, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    with pytest.raises(SystemExit) as caught:
        main(["search", "--config", str(changed), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embtab: error:")]
    assert len(error) == 1
    assert message in error[0]
