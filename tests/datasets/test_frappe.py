import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embtab.datasets import frappe
from embtab.datasets.schema import Dataset
from embtab.errors import DataError, UserError

SIZES = (40, 90, 7, 7, 2, 3, 2, 9, 20, 30)


def fake_lines(rows: int, seed: int, negative: str = "0") -> list[list[str]]:
    """[label, index of each field] as text; the fields' indices follow one another."""
    rng = random.Random(seed)
    first = [sum(SIZES[:j]) for j in range(len(SIZES))]
    return [
        [rng.choice(["1", negative]), *(str(f + int(n * rng.random() ** 3)) for f, n in zip(first, SIZES, strict=True))]
        for _ in range(rows)
    ]


def write(folder: Path, **splits: list[list[str]]) -> Path:
    folder.mkdir()
    for split, lines in splits.items():
        text = "".join(label + "".join(f" {index}:1" for index in fields) + " \n" for label, *fields in lines)
        (folder / f"{split}.libsvm").write_text(text)
    return folder


def expected(train: list[list[str]], lines: list[list[str]]) -> dict[str, list]:
    """Columns by dicts and loops only."""
    columns: dict[str, list] = {"label": [float(line[0] == "1") for line in lines]}
    for j, name in enumerate(frappe.FIELDS, 1):
        counts = Counter(line[j] for line in train)
        ids = {value: i for i, value in enumerate(sorted(counts, key=lambda v: (-counts[v], v)), 1)}
        columns[name] = [ids.get(line[j], 0) for line in lines]
    columns["user_id"] = [int(line[1]) for line in lines]
    return columns


@pytest.mark.parametrize("negative", ["0", "-1"])
def test_three_files_are_three_splits(tmp_path, negative):
    splits = {name: fake_lines(n, n, negative) for name, n in (("train", 300), ("valid", 80), ("test", 90))}
    dataset = frappe.prepare(write(tmp_path / "raw", **splits), tmp_path / "out")
    for split, lines in splits.items():
        assert pq.read_table(tmp_path / "out" / split).to_pydict() == expected(splits["train"], lines)
    assert any(0 in expected(splits["train"], splits["test"])[name] for name in frappe.FIELDS)
    assert [f.name for f in dataset.features] == list(frappe.FIELDS)
    assert Dataset.load(tmp_path / "out") == dataset
    vocabulary = pq.read_table(tmp_path / "out" / "vocab" / "item.parquet")
    assert vocabulary["count"].to_pylist()[0] == 0
    assert sum(vocabulary["count"].to_pylist()) == 300


def test_without_train_a_tenth_of_valid_is_held_out(tmp_path):
    lines, test = fake_lines(200, 1), fake_lines(50, 2)
    for i, line in enumerate(lines):
        line[1] = str(1000 + i)  # the user names the row
    raw = write(tmp_path / "raw", valid=lines, test=[["1", "1000", *line[2:]] for line in test])
    dataset = frappe.prepare(raw, tmp_path / "out")
    assert [dataset.rows(split) for split in ("train", "valid", "test")] == [180, 20, 50]
    held = pq.read_table(tmp_path / "out" / "valid")["user_id"].to_pylist()
    train = [line for line in lines if int(line[1]) not in held]
    assert held == sorted(set(held))
    assert held[-1] - held[0] > 20  # drawn from all over the file
    assert pq.read_table(tmp_path / "out" / "train").to_pydict() == expected(train, train)
    valid = [line for line in lines if int(line[1]) in held]
    assert pq.read_table(tmp_path / "out" / "valid").to_pydict() == expected(train, valid)
    assert frappe.prepare(raw, tmp_path / "again").fingerprint == dataset.fingerprint


GOOD = "1 " + " ".join(f"{i}:1" for i in range(10))
BAD = {
    "label": ("2" + GOOD[1:], "line 3: the label must be 0, 1 or -1, got '2'"),
    "blank line": ("", "line 3: the label must be 0, 1 or -1, got ''"),
    "missing field": (GOOD[:-4], "line 3: has 9 fields, not 10"),
    "extra field": (GOOD + " 11:1", "line 3: has 11 fields, not 10"),
    "text": (GOOD.replace(" 3:1", " x:1"), "line 3: field weekday: must be INDEX:1, got 'x:1'"),
    "value": (GOOD.replace(" 3:1", " 3:0.5"), "line 3: field weekday: must be INDEX:1, got '3:0.5'"),
    "no value": (GOOD.replace(" 3:1", " 3"), "line 3: field weekday: must be INDEX:1, got '3'"),
    "negative": (GOOD.replace(" 3:1", " -3:1"), "line 3: field weekday: must be INDEX:1"),
    "huge": (GOOD.replace(" 3:1", f" {10**18}:1"), "line 3: field weekday: must be INDEX:1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_named(tmp_path, kind):
    raw = write(tmp_path / "raw", test=fake_lines(5, 0))
    line, message = BAD[kind]
    (raw / "valid.libsvm").write_text("\n".join([GOOD, GOOD, line, GOOD]) + "\n")
    assert_refused(raw, f"valid.libsvm: {message}")


def assert_refused(raw: Path, message: str) -> None:
    out = raw.parent / "made" / "out"
    with pytest.raises(DataError) as caught:
        frappe.prepare(raw, out)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_bad_files_are_named(tmp_path):
    raw = write(tmp_path / "raw", valid=fake_lines(20, 0))
    assert_refused(tmp_path / "nowhere", "valid.libsvm: no such file")
    assert_refused(raw, "test.libsvm: no such file")
    (raw / "test.libsvm").write_text("")
    assert_refused(raw, "test.libsvm: is empty")
    (raw / "test.libsvm").write_bytes(b"1 \xff")
    assert_refused(raw, "test.libsvm: is not text")
    (raw / "test.libsvm").unlink()
    (raw / "test.libsvm").mkdir()
    assert_refused(raw, "test.libsvm: cannot be read: Is a directory")
    swapped = [[label, item, user, *rest] for label, user, item, *rest in fake_lines(20, 1)]
    write(tmp_path / "swapped", valid=fake_lines(20, 0), test=swapped)
    assert_refused(tmp_path / "swapped", "occur in the fields item and user")
    touching = fake_lines(20, 1)
    touching[7][1] = touching[3][2] = "40"  # one index in two fields
    write(tmp_path / "touching", valid=touching, test=fake_lines(20, 0))
    assert_refused(tmp_path / "touching", "indices 40 to 40 occur in the fields user and item")


def test_an_output_with_content_is_kept(tmp_path):
    raw = write(tmp_path / "raw", valid=fake_lines(20, 0), test=fake_lines(20, 1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        frappe.prepare(raw, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
