import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from embtab.datasets import criteo
from embtab.datasets.check import check
from embtab.datasets.schema import ROW_GROUP_ROWS, Dataset
from embtab.errors import DataError, UserError
from embtab.features import read_features

COLUMNS = ["label", *criteo.INTEGERS, *criteo.CATEGORIES]


def fake_rows(rows: int, seed: int = 0) -> list[list[str]]:
    """Raw fields; cardinalities grow with the column, so that values are frequent, rare and unseen."""
    rng = random.Random(seed)
    table = []
    for _ in range(rows):
        integers = ["" if rng.random() < 0.2 else str(rng.randint(-3, 500)) for _ in range(13)]
        categories = ["" if rng.random() < 0.1 else f"{rng.randrange(2 + 6 * c):08x}" for c in range(26)]
        table.append([str(rng.randint(0, 1)), *integers, *categories])
    return table


def text_of(rows: list[list[str]]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def write_raw(path: Path, rows: list[list[str]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text_of(rows))
    return path


def columns_of(folder: Path, split: str) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / split)
    return {name: table[name].to_numpy() for name in table.column_names}


def reference(rows: list[list[str]], min_count: int, num_train: int) -> tuple[dict, dict]:
    """Vocabularies {column: [(value, count)]} and encoded columns, with dicts and loops only."""
    vocabularies, encoded = {}, {}
    for c in range(14, 40):
        counts = Counter(row[c] for row in rows[:num_train])
        kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
        rare = sum(n for n in counts.values() if n < min_count)
        ids = {value: i for i, value in enumerate(kept, 1)}
        vocabularies[COLUMNS[c]] = [(None, rare), *((v, counts[v]) for v in kept)]
        encoded[COLUMNS[c]] = [ids.get(row[c], 0) for row in rows]
    return vocabularies, encoded


def z(text: str, transform: str, blank: float) -> float:
    if text == "":
        return blank
    x = int(text)
    if transform == "log":
        return math.log(x) ** 2 if x > 2 else x
    return math.copysign(math.log(1 + abs(x)), x) if transform == "log1p" else x


@pytest.mark.parametrize(("min_count", "transform", "blank"), [(1, "log", 0.0), (2, "log1p", -0.5), (5, "none", -0.5)])
def test_prepare_equals_the_plain_python_definition(tmp_path, min_count, transform, blank):
    rows = fake_rows(203, seed=min_count)
    raw = write_raw(tmp_path / "train.txt", rows)
    out = tmp_path / "out"
    dataset = criteo.prepare(
        [raw], out, min_count=min_count, dense_transform=transform, valid=0.15, test=0.25, blank=blank
    )
    sizes = {"valid": 30, "test": 51, "train": 122}
    vocabularies, encoded = reference(rows, min_count, sizes["train"])
    assert any(v[0][1] > 0 for v in vocabularies.values()) == (min_count > 1)
    start = 0
    for split in ("train", "valid", "test"):
        found = columns_of(out, split)
        stop = start + sizes[split]
        assert dataset.rows(split) == sizes[split]
        assert list(found) == COLUMNS
        assert found["label"].tolist() == [float(row[0]) for row in rows[start:stop]]
        for i, name in enumerate(criteo.INTEGERS, 1):
            expected = np.float32([z(row[i], transform, blank) for row in rows[start:stop]])
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)
            assert found[name].dtype == np.float32
        for name in criteo.CATEGORIES:
            assert found[name].tolist() == encoded[name][start:stop], (split, name)
        start = stop
    for name in criteo.CATEGORIES:
        table = pq.read_table(out / "vocab" / f"{name}.parquet").to_pydict()
        assert list(zip(table["value"], table["count"], strict=True)) == vocabularies[name]
        assert sum(table["count"]) == sizes["train"]
    assert [f.num_ids for f in dataset.features] == [len(vocabularies[name]) for name in criteo.CATEGORIES]


def test_description_says_how_the_folder_was_made(tmp_path):
    rows = fake_rows(50)
    out = tmp_path / "out"
    dataset = criteo.prepare([write_raw(tmp_path / "train.txt", rows)], out)
    assert Dataset.load(out) == dataset
    source = json.loads((out / "dataset.json").read_text())["source"]
    assert source["rows"] == 50
    assert source["files"] == ["train.txt"]
    options = {"min_count": 2, "dense_transform": "log", "valid": 0.1, "test": 0.1, "blank": 0.0, "hashed": False}
    assert source["options"] == options
    assert source["blanks"] == {name: sum(r[i] == "" for r in rows) for i, name in enumerate(criteo.INTEGERS, 1)}
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "test", "train", "valid", "vocab"]
    first = read_features(out)[0]
    assert first.name == "C1"
    assert first.counts.sum() == 40


def test_blank_categories_are_a_value_like_any_other(tmp_path):
    rows = fake_rows(30)
    for i, row in enumerate(rows):
        row[14] = "" if i < 20 else "0000abcd"  # 20 of 24 training rows are blank
        row[15] = "" if i == 0 else "0000abcd"  # once: rare
    out = tmp_path / "out"
    criteo.prepare([write_raw(tmp_path / "train.txt", rows)], out)
    c1 = pq.read_table(out / "vocab" / "C1.parquet").to_pydict()
    assert c1 == {"value": [None, "", "0000abcd"], "count": [0, 20, 4]}
    c2 = pq.read_table(out / "vocab" / "C2.parquet").to_pydict()
    assert c2 == {"value": [None, "0000abcd"], "count": [1, 23]}


def test_same_rows_give_the_same_bytes_however_they_are_packed(tmp_path, monkeypatch):
    """One file or a folder of three with a gzip among them, blocks of any size, line feeds or not at the end."""
    rows = fake_rows(400)
    whole = criteo.prepare([write_raw(tmp_path / "train.txt", rows)], tmp_path / "a")
    again = criteo.prepare([tmp_path / "train.txt"], tmp_path / "b")
    folder = tmp_path / "days"
    folder.mkdir()
    write_raw(folder / "day_2.gz", rows[:100])
    write_raw(folder / "day_9", rows[100:250]).write_bytes(text_of(rows[100:250])[:-1])
    write_raw(folder / "day_10", rows[250:]).write_bytes(text_of(rows[250:]).replace(b"\n", b"\r\n"))
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 1000)
    parts = criteo.prepare([folder], tmp_path / "c")
    assert whole.fingerprint == again.fingerprint == parts.fingerprint
    assert parts.source["files"] == ["day_2.gz", "day_9", "day_10"]


def test_row_groups_are_full_and_rows_stay_in_order(tmp_path):
    rows = fake_rows(1)
    line = "\t".join(rows[0][:13]) + "\t{}\t" + "\t".join(rows[0][14:]) + "\n"
    count = 2 * ROW_GROUP_ROWS + 5000
    raw = tmp_path / "train.txt"
    raw.write_text("".join(line.format(i) for i in range(count)))  # I13 is the row number
    out = tmp_path / "out"
    criteo.prepare([raw], out, dense_transform="none", valid=0, test=0.01)
    groups = pq.read_metadata(out / "train" / "part-00000.parquet")
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    num_test = round(count * 0.01)
    assert sizes == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 5000 - num_test]
    assert not (out / "valid").exists()
    numbers = [*columns_of(out, "train")["I13"], *columns_of(out, "test")["I13"]]
    assert numbers == list(range(count))


def spoil(line: int, column: int, text: str | bytes) -> bytes:
    """25 good lines, but one field replaced; lines and columns count from 1 and 0."""
    lines = [row.split(b"\t") for row in text_of(fake_rows(25)).splitlines()]
    lines[line - 1][column] = text if isinstance(text, bytes) else text.encode()
    return b"".join(b"\t".join(fields) + b"\n" for fields in lines)


def lines_with(line: int, text: bytes) -> bytes:
    lines = text_of(fake_rows(25)).splitlines()
    lines[line - 1] = text
    return b"\n".join(lines) + b"\n"


GOOD = text_of(fake_rows(25))
GOOD_LINE = GOOD.splitlines()[0]
BAD_TEXT = {
    "missing column": (lines_with(7, GOOD_LINE.rpartition(b"\t")[0]), "line 7: has 39 columns, not 40"),
    "extra column": (lines_with(25, GOOD_LINE + b"\tab"), "line 25: has 41 columns, not 40"),
    "one missing, one extra": (
        lines_with(9, GOOD_LINE.rpartition(b"\t")[0]) + GOOD_LINE + b"\tab\n",
        "line 9: has 39 columns, not 40",
    ),
    "first line short": (lines_with(1, b"1\t2"), "line 1: has 2 columns"),
    "blank line": (lines_with(3, b""), "line 3: has 0 columns"),
    "only blank lines": (b"\n\n", "line 1: has 0 columns"),
    "text in a number": (spoil(4, 3, "12x"), "line 4: column I3: must be a whole number or blank, got '12x'"),
    "fraction in a number": (spoil(5, 13, "1.5"), "line 5: column I13: must be a whole number or blank, got '1.5'"),
    "number beyond int64": (spoil(5, 1, "9" * 19), "line 5: column I1: must be a whole number"),
    "label 2": (spoil(8, 0, "2"), "line 8: column label: must be 0 or 1, got '2'"),
    "label -1": (spoil(8, 0, "-1"), "line 8: column label: must be 0 or 1, got '-1'"),
    "label blank": (spoil(25, 0, ""), "line 25: column label: must be 0 or 1, got ''"),
    "header": ("\t".join(COLUMNS).encode() + b"\n" + GOOD, "line 1: column label: must be 0 or 1, got 'label'"),
    "invalid UTF-8": (spoil(6, 20, b"ab\xffc"), "line 6: column C7: is not valid UTF-8"),
    "invalid UTF-8 in a number": (spoil(6, 2, b"\xff"), "line 6: column I2: must be a whole number"),
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "truncated gzip": (gzip.compress(GOOD)[:-20], "truncated"),
    "truncated gzip header": (b"\x1f\x8b\x08", "truncated"),
    "damaged gzip": (gzip.compress(GOOD)[:40] + b"\0" * 400 + gzip.compress(GOOD)[440:], "damaged"),
    "gzip with a wrong checksum": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged"),
}


@pytest.mark.parametrize("block_bytes", [32 << 20, 500])
@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, kind, block_bytes):
    text, message = BAD_TEXT[kind]
    raw, good = tmp_path / "raw.txt", tmp_path / "good.txt"
    raw.write_bytes(text)
    good.write_bytes(GOOD)
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", block_bytes)
    with pytest.raises(DataError) as caught:
        criteo.prepare([good, raw], tmp_path / "made" / "out")
    assert str(caught.value).startswith(f"{raw}: {message}" if message.startswith("line") else f"{raw}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 1000)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(b"\x01" * 5000)
    with pytest.raises(DataError, match="line 1: longer than 1000 bytes"):
        criteo.prepare([raw], tmp_path / "out")


def test_missing_and_hopeless_inputs(tmp_path):
    raw = write_raw(tmp_path / "train.txt", fake_rows(25))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        criteo.prepare([tmp_path / "nowhere.txt"], out)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        criteo.prepare([tmp_path / "nothing"], out)
    with pytest.raises(DataError, match="too few"):
        criteo.prepare([write_raw(tmp_path / "one.txt", fake_rows(1))], out, valid=0.0, test=0.6)
    for options in ({"min_count": 0}, {"dense_transform": "sqrt"}, {"valid": 1.0}, {"valid": 0.5, "test": 0.5}):
        with pytest.raises(UserError):
            criteo.prepare([raw], out, **options)
    with pytest.raises(UserError, match="blank must be a finite float32 number"):
        criteo.prepare([raw], out, blank=math.nan)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="already exists"):
        criteo.prepare([raw], out)
    assert (out / "mine").exists()


def test_polars_sees_the_same_file_as_pyarrow(tmp_path):
    criteo.prepare([write_raw(tmp_path / "train.txt", fake_rows(60))], tmp_path / "out")
    file = tmp_path / "out" / "train" / "part-00000.parquet"
    assert pl.read_parquet(file).to_dict(as_series=False) == pq.read_table(file).to_pydict()
    assert pq.read_schema(file).field("C1").nullable is False
    assert json.loads(pq.read_schema(file).metadata[b"embtab"])["dense"] == list(criteo.INTEGERS)


def test_a_carriage_return_within_a_line_is_refused(tmp_path):
    """polars would take it off the value's end, and so give it the id of another value."""
    rows = fake_rows(20)
    rows[4][20] += "\r"
    with pytest.raises(DataError, match="line 5: holds a carriage return that does not end the line"):
        criteo.prepare([write_raw(tmp_path / "train.txt", rows)], tmp_path / "out")


def test_lines_may_end_as_on_windows(tmp_path):
    rows = fake_rows(60)
    criteo.prepare([write_raw(tmp_path / "one.txt", rows)], tmp_path / "one")
    (tmp_path / "two.txt").write_bytes(text_of(rows).replace(b"\n", b"\r\n"))
    criteo.prepare([tmp_path / "two.txt"], tmp_path / "two")
    assert pq.read_table(tmp_path / "one/train").equals(pq.read_table(tmp_path / "two/train"))


def test_text_that_is_packed_twice_is_refused(tmp_path):
    (tmp_path / "train.gz").write_bytes(gzip.compress(gzip.compress(text_of(fake_rows(50)))[:-20]))
    with pytest.raises(DataError, match=r"train.gz: line 1: has \d+ columns, not 40"):
        criteo.prepare([tmp_path / "train.gz"], tmp_path / "out")


def test_hashed_categories_are_ids_as_they_stand(tmp_path):
    rows = fake_rows(100, seed=7)
    rows[3][20], rows[4][20] = "ffffffff", "7fffffffffffffff"
    for row in rows:
        row[30] = ""
    dataset = criteo.prepare([write_raw(tmp_path / "train.txt", rows)], tmp_path / "out", hashed=True)
    read = [columns_of(tmp_path / "out", split) for split in ("train", "valid", "test")]
    for c, name in enumerate(criteo.CATEGORIES, 14):
        wanted = [int(row[c], 16) if row[c] else -1 for row in rows]
        assert np.concatenate([found[name] for found in read]).tolist() == wanted
        assert [f.num_ids for f in dataset.features if f.name == name] == [len(set(wanted))]
    assert all(feature.hashed and feature.counts is None for feature in read_features(tmp_path / "out"))
    assert list((tmp_path / "out/vocab").iterdir()) == []
    assert check(tmp_path / "out") == []


@pytest.mark.parametrize("value", ["-1", "zz", "8000000000000000", " 1"])
def test_categories_that_are_no_hexadecimal_numbers_cannot_be_hashed(tmp_path, value):
    rows = fake_rows(20)
    rows[7][15] = value
    raw = write_raw(tmp_path / "train.txt", rows)
    with pytest.raises(DataError, match=r"train\.txt: line 8: column C2: must be hexadecimal and below 2\^63"):
        criteo.prepare([raw], tmp_path / "out", hashed=True)
    assert not (tmp_path / "out").exists()
