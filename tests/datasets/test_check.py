import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embtab.datasets.check import Problem, check
from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer
from embtab.datasets.synthetic import prepare
from embtab.errors import DataError
from embtab.features import read_features

FEATURES = (Categorical("C1", 10), Categorical("tags", 5, multi=True))
SPLITS = {"train": 40, "valid": 20, "test": 20}


def columns(rows: int) -> dict[str, list]:
    return {
        "label": [float(i % 2) for i in range(rows)],
        "I1": [i / 2 for i in range(rows)],
        "C1": [i % 10 for i in range(rows)],
        "tags": [[j % 5 for j in range(i % 3)] for i in range(rows)],
    }


def write_split(folder: Path, split: str, values: dict[str, list], dataset: Dataset) -> None:
    """One file with row groups of ten rows; columns that are not of the schema's type keep their own."""
    schema = dataset.arrow_schema()
    fields = []
    for name, column in values.items():
        try:
            kind = pa.list_(pa.int64()) if name == "tags" else schema.field(name).type
            pa.array(column, kind)
            fields.append(pa.field(name, kind))
        except (KeyError, pa.ArrowException):
            fields.append(pa.field(name, pa.array(column).type))
    with open_writer(folder / split / "part-00000.parquet", pa.schema(fields)) as writer:
        writer.write_table(pa.table(list(values.values()), schema=pa.schema(fields)), row_group_size=10)


def write_counts(folder: Path, name: str, counts: list) -> None:
    (folder / "vocab").mkdir(exist_ok=True)
    pq.write_table(pa.table({"count": counts}), folder / "vocab" / f"{name}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder without problems."""
    folder = tmp_path / "data"
    dataset = Dataset("made", FEATURES, dense=("I1",))
    for split, rows in SPLITS.items():
        write_split(folder, split, columns(rows), dataset)
    train = columns(SPLITS["train"])
    write_counts(folder, "C1", np.bincount(train["C1"], minlength=10).tolist())
    write_counts(folder, "tags", np.bincount([tag for bag in train["tags"] for tag in bag], minlength=5).tolist())
    describe(folder, dataset)
    return folder


def describe(folder: Path, dataset: Dataset) -> None:
    replace(dataset, files=describe_files(folder)).save(folder)


def plant(folder: Path, split: str, name: str, change) -> None:
    """Changes one column of a split and describes the folder anew, so that only the values are wrong."""
    values = columns(SPLITS[split])
    if change is None:
        del values[name]
    else:
        values[name] = change(values.get(name))
    dataset = Dataset.load(folder)
    write_split(folder, split, values, dataset)
    describe(folder, dataset)


def put(at: int, value):
    return lambda column: [value if i == at else old for i, old in enumerate(column)]


def only(folder: Path) -> Problem:
    problems = check(folder)
    assert len(problems) == 1, [str(problem) for problem in problems]
    assert "\n" not in str(problems[0])
    return problems[0]


def test_good_data_is_silent(folder):
    assert check(folder) == []


def test_generated_data_is_good(tmp_path):
    prepare(tmp_path / "data", rows=3000, scale=0.001, multi=3)
    assert check(tmp_path / "data") == []


VALUES = [
    ("train", "C1", put(25, 10), 2, 5, "id 10 lies outside [0, 10)"),
    ("train", "C1", put(0, -1), 0, 0, "id -1 lies outside [0, 10)"),
    ("valid", "tags", put(14, [4, 4, 5]), 1, 4, "id 5 lies outside [0, 5)"),
    ("test", "C1", put(19, None), 1, 9, "is null; fill it when preparing the data"),
    ("train", "tags", put(13, None), 1, 3, "is null; fill it when preparing the data"),
    ("train", "tags", put(17, [1, None]), 1, 7, "is null; fill it when preparing the data"),
    ("valid", "I1", put(3, float("nan")), 0, 3, "value nan is not finite"),
    ("valid", "I1", put(11, float("-inf")), 1, 1, "value -inf is not finite"),
    ("test", "I1", put(2, None), 0, 2, "is null; fill it when preparing the data"),
    ("train", "label", put(39, 0.5), 3, 9, "label 0.5 is neither 0 nor 1"),
    ("train", "label", put(12, float("nan")), 1, 2, "label nan is neither 0 nor 1"),
    ("test", "label", put(7, None), 0, 7, "is null; fill it when preparing the data"),
]


@pytest.mark.parametrize(("split", "column", "change", "row_group", "row", "message"), VALUES)
def test_wrong_values_are_found_where_they_are(folder, split, column, change, row_group, row, message):
    plant(folder, split, column, change)
    path = str(folder / split / "part-00000.parquet")
    problem = only(folder)
    assert problem == Problem(path, row_group, column, row, message)
    assert str(problem) == f"{path}, row group {row_group}, column {column!r}, row {row}: {message}"


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("I1", None, "column 'I1' is missing"),
        ("C1", lambda _: ["a"] * 20, "column 'C1' is string but must be int64"),
        ("more", lambda _: [1] * 20, "column 'more' is not in dataset.json"),
    ],
)
def test_wrong_columns_are_named(folder, column, change, message):
    plant(folder, "valid", column, change)
    problem = only(folder)
    assert (problem.column, problem.message) == (column, message)
    assert problem.file.endswith("valid/part-00000.parquet")


def test_every_problem_of_a_folder_is_found(folder):
    plant(folder, "train", "C1", put(5, 99))
    values = {**columns(20), "label": [0.0] * 20, "I1": [float("inf")] * 20}
    write_split(folder, "test", values, Dataset.load(folder))
    describe(folder, Dataset.load(folder))
    found = {(Path(p.file).parts[-1], p.column, p.row, p.warning) for p in check(folder)}
    assert found == {
        ("part-00000.parquet", "C1", 5, False),
        ("part-00000.parquet", "I1", 0, False),
        ("test", "label", None, True),
    }


def test_single_class_split_is_a_warning(folder):
    plant(folder, "valid", "label", lambda labels: [1.0] * len(labels))
    problem = only(folder)
    assert problem.warning
    assert str(problem).startswith("warning: ")
    assert "every label of the split is 1" in problem.message


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_splits(folder, split):
    (folder / split / "part-00000.parquet").unlink()
    describe(folder, Dataset.load(folder))
    problems = [problem for problem in check(folder) if problem.message == "the split has no rows"]
    assert [(Path(problem.file).name, problem.warning) for problem in problems] == [(split, split == "test")]


def test_absent_truncated_changed_and_unlisted_files(folder):
    path = folder / "valid/part-00000.parquet"
    whole = path.read_bytes()
    path.unlink()
    assert "does not exist" in only(folder).message
    path.write_bytes(whole[:-9])
    assert "truncated or not a Parquet file" in only(folder).message
    write_split(folder, "valid", {**columns(20), "I1": [1.0] * 20}, Dataset.load(folder))
    assert only(folder).message == "changed since it was prepared: its checksum differs"
    write_split(folder, "valid", columns(19), Dataset.load(folder))
    assert only(folder).message == "has 19 rows but dataset.json says 20; prepare the data again"
    path.write_bytes(whole)
    (folder / "valid/part-00001.parquet").write_bytes(whole)
    assert only(folder) == Problem(
        str(folder / "valid/part-00001.parquet"),
        None,
        None,
        None,
        "is not listed in dataset.json; remove it or prepare the data again",
    )


def test_damaged_pages(folder):
    path = folder / "test/part-00000.parquet"
    column = pq.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(content)
    describe(folder, Dataset.load(folder))
    problem = only(folder)
    assert (problem.row_group, problem.column) == (1, "C1")
    assert problem.message.startswith("cannot be decoded")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4] * 9, "has 9 rows but dataset.json says 10 ids"),
        ([4] * 7 + [5, 3, 4], "id 7 occurs 4 times in the training split but its count is 5 (2 of 10 ids differ)"),
        ([4.0] * 10, "must be int64 without nulls"),
        ([4] * 9 + [None], "must be int64 without nulls"),
    ],
)
def test_vocabulary_counts(folder, counts, message):
    write_counts(folder, "C1", counts)
    assert only(folder) == Problem(str(folder / "vocab/C1.parquet"), None, "count", None, message)


def test_absent_and_unreadable_vocabulary(folder):
    (folder / "vocab/C1.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in only(folder).message
    pq.write_table(pa.table({"value": ["a"]}), folder / "vocab/C1.parquet")
    assert "cannot be read" in only(folder).message
    (folder / "vocab/C1.parquet").unlink()
    assert only(folder).warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2 is not known"),
        (lambda d: d.pop("features"), "features"),
        (lambda d: d["features"][0].update(num_ids=0), "num_ids must be a positive whole number"),
        (lambda d: d["features"][1].update(name="C1"), "listed twice"),
        (lambda d: d.update(format="other"), "not an embtab dataset description"),
    ],
)
def test_description(folder, change, message):
    described = json.loads((folder / "dataset.json").read_text())
    change(described)
    (folder / "dataset.json").write_text(json.dumps(described))
    problem = only(folder)
    assert problem.file.endswith("dataset.json")
    assert message in problem.message


def test_no_dataset(tmp_path):
    assert "no dataset.json" in str(only(tmp_path))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4] * 9, "has 9 rows but dataset.json says 10 ids"),
        ([4] * 9 + [-1], "is negative"),
        (["a"] * 10, "must be int64 without nulls"),
        ([[1]] * 10, "must be int64 without nulls"),
    ],
)
def test_features_are_not_read_with_other_counts(folder, counts, message):
    write_counts(folder, "C1", counts)
    with pytest.raises(DataError, match=rf"vocab/C1\.parquet, column 'count'.*: {message}"):
        read_features(folder)
    (folder / "vocab/C1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"vocab/C1\.parquet, column 'count': cannot be read"):
        read_features(folder)


def test_more_ids_than_memory(folder):
    """A cardinality that only the description claims is not believed."""
    described = json.loads((folder / "dataset.json").read_text())
    described["features"][0]["num_ids"] = 10**18
    (folder / "dataset.json").write_text(json.dumps(described))
    assert only(folder).message == f"has 10 rows but dataset.json says {10**18} ids"


@pytest.mark.parametrize(
    "path",
    [
        "valid/../../secret/x.parquet",
        "valid/a/../x.parquet",
        "valid/..",
        "valid/",
        "/etc/x.parquet",
        "valid/x\0.parquet",
    ],
)
def test_files_outside_the_folder_are_refused(folder: Path, path: str) -> None:
    described = json.loads((folder / "dataset.json").read_text())
    (folder.parent / "secret").mkdir()
    (folder / described["files"][0]["path"]).rename(folder.parent / "secret" / "x.parquet")
    described["files"][0]["path"] = path
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"dataset\.json: file .* is no SPLIT/NAME\.parquet"):
        Dataset.load(folder)


@pytest.mark.parametrize("name", ["../../secret", "/etc/x", "a\0b"])
def test_features_whose_vocabulary_would_lie_outside_are_refused(folder: Path, name: str) -> None:
    described = json.loads((folder / "dataset.json").read_text())
    described["features"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(described))
    for read in (Dataset.load, read_features):
        with pytest.raises(DataError, match="file"):
            read(folder)
