"""Avazu logs: whole hours in time order, every category by its count in train."""

import csv
import gzip
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embtab.cli import main
from embtab.datasets import avazu
from embtab.datasets.check import check
from embtab.errors import DataError, UserError

HEADER = ["id", "click", "hour", *avazu.CATEGORIES]


def log(hours: int, per_hour: int = 20, seed: int = 0) -> list[dict[str, str]]:
    """Impressions of consecutive hours from midnight of the 21st of October 2014, a Tuesday."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(hours * per_hour):
        hour = datetime(2014, 10, 21) + timedelta(hours=i // per_hour)
        row = {"id": str(10**19 + i), "click": str(rng.integers(2)), "hour": hour.strftime("%y%m%d%H")}
        rows.append(row | {name: f"{rng.integers(3 + j):08x}" for j, name in enumerate(avazu.CATEGORIES)})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_prepare_equals_the_plain_python_definition(tmp_path):
    rows = log(30)
    dataset = avazu.prepare([write(tmp_path / "train.gz", rows)], tmp_path / "out", min_count=30)
    assert {split: dataset.rows(split) for split in ("train", "valid", "test")} == {
        "train": 480,
        "valid": 60,
        "test": 60,
    }
    found = [row for s in ("train", "valid", "test") for row in pq.read_table(tmp_path / "out" / s).to_pylist()]
    assert [row["click"] for row in found] == [float(row["click"]) for row in rows]
    assert [row["hour_hour"] for row in found] == [i // 20 % 24 for i in range(600)]
    assert [row["hour_weekday"] for row in found] == [1 + i // 480 for i in range(600)]
    unseen = 0
    for name in avazu.CATEGORIES:
        counts = Counter(row[name] for row in rows[:480])
        kept = sorted((v for v in counts if counts[v] >= 30), key=lambda v: (-counts[v], v))
        ids = {value: i for i, value in enumerate(kept, 1)}
        assert [row[name] for row in found] == [ids.get(row[name], 0) for row in rows]
        unseen += sum(row[name] not in ids for row in rows)
    assert unseen
    assert [feature.name for feature in dataset.features] == [*avazu.CATEGORIES, "hour_hour", "hour_weekday"]
    assert check(tmp_path / "out") == []


def test_the_command_gives_the_same_from_plain_parts(tmp_path, capsys):
    rows = log(20)
    whole = avazu.prepare([write(tmp_path / "train.gz", rows)], tmp_path / "one")
    parts = [write(tmp_path / "1.csv", rows[:130]), write(tmp_path / "2.csv", rows[130:])]
    main(["prepare", "avazu", *map(str, parts), "--out", str(tmp_path / "two")])
    assert "23 features" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "two/train").equals(pq.read_table(tmp_path / "one/train"))
    assert whole.rows("train") == 320


def test_mistakes_are_named(tmp_path):
    rows = log(10)
    rows[4]["hour"] = "2014-10-21"
    with pytest.raises(DataError, match=r"train.csv, line 6, column 'hour': must be a time written as %y%m%d%H"):
        avazu.prepare([write(tmp_path / "train.csv", rows)], tmp_path / "out")
    with pytest.raises(UserError, match="min_count must be 1 or more, got 0"):
        avazu.prepare([tmp_path / "train.csv"], tmp_path / "out", min_count=0)
    (tmp_path / "test.csv").write_text((tmp_path / "train.csv").read_text().replace("click,", ""))
    with pytest.raises(DataError, match=r"test.csv: has no column 'click'; there are id, hour, C1"):
        avazu.prepare([tmp_path / "test.csv"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
