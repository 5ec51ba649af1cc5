"""A small prepared folder to spoil, and what reading and checking it must come to, by pyarrow and NumPy alone."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing.mutations import mutate_file, mutate_json, pick
from numpy.random import Generator

from embtab.datasets.reader import Batch
from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer

SIZES = {"train": [25, 15], "valid": [12], "test": [10]}  # rows of each file


def write_prepared(folder: Path, rng: Generator) -> None:
    dataset = Dataset("made", (Categorical("C1", 9), Categorical("tags", 5, multi=True)), ("I1",), user="who")
    schema = dataset.arrow_schema()
    counts = {"C1": np.zeros(9, np.int64), "tags": np.zeros(5, np.int64)}
    for split, sizes in SIZES.items():
        for number, rows in enumerate(sizes):
            ids, tags = rng.integers(0, 9, rows), [rng.integers(0, 5, rng.integers(4)) for _ in range(rows)]
            columns = [rng.integers(0, 2, rows), rng.standard_normal(rows), ids, tags, rng.integers(0, 6, rows)]
            with open_writer(folder / split / f"part-{number:05}.parquet", schema) as writer:
                arrays = [pa.array(list(c), field.type) for c, field in zip(columns, schema, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=10)
            if split == "train":
                np.add.at(counts["C1"], ids, 1)
                np.add.at(counts["tags"], np.concatenate(tags), 1)
    (folder / "vocab").mkdir()
    for name, seen in counts.items():
        pq.write_table(pa.table({"count": seen}), folder / "vocab" / f"{name}.parquet")
    replace(dataset, files=describe_files(folder)).save(folder)


def mutate_prepared(folder: Path, rng: Generator) -> str:
    """Spoils a file of the folder; mostly the description is made to agree with it, so that its values are read."""
    if rng.random() < 0.35:
        return f"dataset.json: {mutate_json(folder / 'dataset.json', rng)}"
    file = pick(rng, sorted(folder.rglob("*.parquet")))
    how = f"{file.relative_to(folder)}: {mutate_file(file, rng)}"
    if rng.random() < 0.7:
        with suppress(pa.ArrowException, OSError):
            replace(Dataset.load(folder), files=describe_files(folder)).save(folder)
    return how


def columns_of(folder: Path, split: str) -> dict[str, Any]:
    """Every column of a split as a list, in the order of its files."""
    files = sorted(f["path"] for f in json.loads((folder / "dataset.json").read_text())["files"])
    tables = [pq.ParquetFile(folder / file).read() for file in files if file.startswith(f"{split}/")]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].column_names}


def verify_batches(folder: Path, split: str, batches: list[Batch]) -> None:
    """Batches hold what pyarrow reads."""
    described = json.loads((folder / "dataset.json").read_text())
    wanted = columns_of(folder, split)
    np.testing.assert_array_equal(
        [x for b in batches for x in b.label.tolist()], wanted[described.get("label", "label")]
    )
    for i, name in enumerate(described.get("dense", ())):
        np.testing.assert_array_equal([x for b in batches for x in b.dense[:, i].tolist()], wanted[name])
    if described.get("user"):
        assert [x for b in batches for x in b.user.tolist()] == wanted[described["user"]]  # type: ignore[union-attr]
    for feature in described["features"]:
        bags = [b.sparse[feature["name"]] for b in batches]
        found = [bag.tolist() for each in bags for bag in each.values().split(each.lengths().tolist())]
        assert found == [value if isinstance(value, list) else [value] for value in wanted[feature["name"]]]


def verify_checked(folder: Path) -> None:
    """A folder of which nothing was said is good: every value is one that its column may hold, every count is true."""
    described = json.loads((folder / "dataset.json").read_text())
    for split in SIZES:
        columns = columns_of(folder, split)
        assert set(columns[described.get("label", "label")]) <= {0.0, 1.0}
        assert all(np.isfinite(columns[name]).all() for name in described.get("dense", ()))
        for feature in described["features"]:
            values = columns[feature["name"]]
            ids = np.array([i for bag in values for i in bag] if feature.get("multi") else values, np.int64)
            assert ids.min() >= 0
            assert ids.max() < feature["num_ids"]
            vocabulary = folder / "vocab" / f"{feature['name']}.parquet"
            if split == "train" and vocabulary.exists():
                counts = pq.ParquetFile(vocabulary).read()["count"].to_pylist()
                assert counts == np.bincount(ids, minlength=feature["num_ids"]).tolist()
