"""Prepared tables equal what dicts and loops say, however the same table is written down."""

import csv
import gzip
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from embtab.cli import main
from embtab.compare.sweep import read_sweep
from embtab.datasets import table
from embtab.datasets.check import check
from embtab.datasets.roles_file import read_roles
from embtab.datasets.schema import Dataset
from embtab.features import read_features

SCHEMA = pa.schema(
    {
        "clicked": pa.int8(),
        "price": pa.float64(),
        "city": pa.string(),
        "item": pa.int32(),
        "place": pa.int64(),
        "tags": pa.list_(pa.string()),
        "bought": pa.list_(pa.int64()),
        "who": pa.string(),
        "at": pa.int64(),
        "ignored": pa.string(),
    }
)
ROLES = {
    "label": "clicked",
    "dense": {"price": {"transform": "log1p", "fill": -1}},
    "categorical": {"city": None, "item": {"min_count": 1}, "place": {"raw": True}, "who": None},
    "multi": {"tags": {"separator": "|"}},
    "history": {"bought": {"of": "item", "max_length": 3, "separator": "|"}},
    "user": "who",
    "time": "at",
    "split": {"by": "time", "valid": 0.2, "test": 0.25},
    "min_count": 2,
}

texts = st.text(alphabet='aé", \n', max_size=2)
tags = st.text(alphabet="ab\"',", min_size=1, max_size=2)
numbers = st.integers(0, 6)
ROW = st.fixed_dictionaries(
    {
        "clicked": st.integers(0, 1),
        "price": st.none() | st.floats(-1e6, 1e6, allow_nan=False),
        "city": st.none() | texts,
        "item": st.none() | numbers,
        "place": numbers,
        "tags": st.none() | st.lists(tags, max_size=4),
        "bought": st.none() | st.lists(numbers, max_size=5),
        "who": st.text(alphabet="uv", min_size=1, max_size=3),
        "at": st.integers(-(2**62), 2**62) | st.integers(0, 30),
        "ignored": texts,
    }
)
BLANK = dict.fromkeys(SCHEMA.names) | {"clicked": 0, "place": 0, "who": "u", "ignored": ""}
small = settings(max_examples=20)


def write_parquet(path: Path, rows: list[dict], schema: pa.Schema = SCHEMA, group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            written = {k: "|".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
            writer.writerow(written)
    return path


def write_roles(path: Path, **changes: object) -> Path:
    roles = {key: value for key, value in (ROLES | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(roles, sort_keys=False))
    return path


def prepared(folder: Path, raw: list[Path], **changes: object) -> Dataset:
    return table.prepare(raw, folder / "out", roles=write_roles(folder / "roles.yaml", name="t", **changes))


def rows_of(folder: Path) -> dict[str, list[dict]]:
    return {split: pq.read_table(folder / split).to_pylist() for split in ("train", "valid", "test")}


def cut_by_time(rows: list[dict], valid: float, test: float) -> dict[str, list[dict]] | None:
    """Rows of each split; None where moments are too few for it."""
    at = [float(row["at"]) for row in rows]  # a moment is a double: 2^54 - 1 and 2^54 are one
    times = sorted(at)
    num_valid, num_test = round(len(rows) * valid), round(len(rows) * test)
    first_valid = times[len(rows) - num_valid - num_test]
    first_test = times[len(rows) - num_test]
    if not times[0] < first_valid < first_test:
        return None
    return {
        "train": [row for row, time in zip(rows, at, strict=True) if time < first_valid],
        "valid": [row for row, time in zip(rows, at, strict=True) if first_valid <= time < first_test],
        "test": [row for row, time in zip(rows, at, strict=True) if time >= first_test],
    }


def values_of(row: dict, column: str) -> list[str]:
    value = row[column]
    if column == "tags":
        return value or []
    if column == "bought":
        return [str(item) for item in (value or [])[-3:]]
    return ["" if value is None else str(value)]


def vocabularies_of(train: list[dict]) -> dict[str, list[tuple[str | None, int]]]:
    counts = {name: Counter() for name in ("city", "item", "tags", "bought", "who")}
    for row in train:
        for name, counter in counts.items():
            counter.update(values_of(row, name))
    found = {}
    for name, least, members in [
        ("city", 2, ["city"]),
        ("who", 2, ["who"]),
        ("tags", 2, ["tags"]),
        ("item", 1, ["item", "bought"]),
        ("bought", 1, ["item", "bought"]),
    ]:
        together = Counter()
        for member in members:
            together += counts[member]
        kept = [v for v in together if together[v] >= least]
        kept.sort(key=lambda v: (-together[v], v.encode()))
        rare = sum(n for v, n in counts[name].items() if together[v] < least)
        found[name] = [(None, rare), *((v, counts[name][v]) for v in kept)]
    return found


def z(x: float | None) -> float:
    return -1 if x is None else math.copysign(math.log(1 + abs(x)), x)


@small
@given(st.lists(ROW, min_size=6, max_size=40))
@hypothesis.example(rows=[BLANK | {"at": at} for at in (0, 0, 0, 1, 2**54 - 1, 2**54 - 1)])
def test_prepared_rows_equal_the_plain_definition_from_parquet_and_from_text(tmp_path_factory, rows):
    splits = cut_by_time(rows, 0.2, 0.25)
    if splits is None:
        return
    folder = tmp_path_factory.mktemp("t")
    dataset = prepared(folder, [write_parquet(folder / "a.parquet", rows)])
    vocabularies = vocabularies_of(splits["train"])
    ids = {name: {v: i for i, (v, _) in enumerate(known)} for name, known in vocabularies.items()}
    found = rows_of(folder / "out")
    numbers: dict[str, int] = {}
    for split, wanted in splits.items():
        assert len(found[split]) == len(wanted)
        for row, raw in zip(found[split], wanted, strict=True):
            assert row.pop("clicked") == raw["clicked"]
            assert row.pop("price") == pytest.approx(z(raw["price"]), rel=1e-6)
            assert row.pop("place") == raw["place"]
            assert numbers.setdefault(raw["who"], row["who_number"]) == row.pop("who_number")
            for name in ("city", "item", "who", "tags", "bought"):
                encoded = [ids[name].get(value, 0) for value in values_of(raw, name)]
                assert row.pop(name) == (encoded if name in ("tags", "bought") else encoded[0])
            assert not row
    assert len(set(numbers.values())) == len(numbers)
    for name, known in vocabularies.items():
        saved = pq.read_table(folder / "out" / "vocab" / f"{name}.parquet").to_pydict()
        assert list(zip(saved["value"], saved["count"], strict=True)) == known
    sizes = {feature.name: feature.num_ids for feature in dataset.features}
    assert sizes.pop("place") == 1 + max(row["place"] for row in rows)
    assert sizes == {name: len(known) for name, known in vocabularies.items()}
    assert [p for p in check(folder / "out") if not p.warning] == []

    other = tmp_path_factory.mktemp("csv")
    assert prepared(other, [write_csv(other / "a.csv", rows)]).fingerprint == dataset.fingerprint


@small
@given(st.lists(ROW, min_size=6, max_size=30), st.floats(0, 0.4), st.floats(0, 0.4))
def test_no_training_row_is_later_than_a_test_row(tmp_path_factory, rows, valid, test):
    folder = tmp_path_factory.mktemp("t")
    raw = write_parquet(folder / "a.parquet", [row | {"place": row["at"] % 2**30} for row in rows])
    split = {"by": "time", "valid": valid, "test": test}
    try:
        prepared(folder, [raw], split=split, categorical={"at": {"min_count": 1}, "item": None, "city": None})
    except ValueError as error:
        assert "one moment" in str(error) or "too few" in str(error)
        return
    saved = Counter(pq.read_table(folder / "out/vocab/at.parquet")["value"].to_pylist()[1:])
    sizes = {split: len(found) for split, found in rows_of_existing(folder / "out").items()}
    trained = sorted(row["at"] for row in rows)[: sizes["train"]]
    assert set(map(str, trained)) == set(saved)  # train holds exactly the earliest rows
    assert not set(trained) & {row["at"] for row in sorted(rows, key=lambda r: r["at"])[sizes["train"] :]}


def rows_of_existing(folder: Path) -> dict[str, list[dict]]:
    return {s: pq.read_table(folder / s).to_pylist() for s in ("train", "valid", "test") if (folder / s).exists()}


def example(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "clicked": int(rng.integers(2)),
            "price": float(rng.normal()),
            "city": f"c{rng.integers(6)}",
            "item": int(rng.integers(9)),
            "place": int(rng.integers(5)),
            "tags": [f"t{t}" for t in rng.integers(0, 4, rng.integers(0, 3))],
            "bought": rng.integers(0, 9, rng.integers(0, 6)).tolist(),
            "who": f"u{rng.integers(7)}",
            "at": 1_700_000_000 + 1000 * i,
            "ignored": "x",
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("by", ["time", "random", "order"])
def test_many_files_in_folders_equal_one(tmp_path, by):
    rows = example(60)
    split = {"by": by, "valid": 0.2, "test": 0.2}
    one = prepared(tmp_path, [write_parquet(tmp_path / "one.parquet", rows)], split=split)
    (tmp_path / "many").mkdir()
    for part in (2, 10):
        first = 0 if part == 2 else 25
        write_parquet(tmp_path / f"raw/day={part}/part-0.parquet", rows[first : 25 if part == 2 else None], group=4)
    write_parquet(tmp_path / "raw/_temporary/part-1.parquet", rows)
    write_parquet(tmp_path / "raw/.old.parquet", rows)
    (tmp_path / "raw/_SUCCESS").write_text("")
    assert prepared(tmp_path / "many", [tmp_path / "raw"], split=split).fingerprint == one.fingerprint
    assert [one.rows(s) for s in ("train", "valid", "test")] == [36, 12, 12]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dataset.json", "test", "train", "valid", "vocab"]


def test_a_random_split_depends_on_its_seed_alone(tmp_path):
    rows = example(60)
    fingerprints = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        raw = write_parquet(tmp_path / f"{i}/a.parquet", rows, group=3 + i)
        fingerprints.append(prepared(tmp_path / str(i), [raw], split={"by": "random", "seed": seed}).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_splits_of_a_column_and_of_files_are_taken_as_given(tmp_path):
    rows = [row | {"ignored": ["a", "b", "c", "d"][i % 4]} for i, row in enumerate(example(40))]
    fold = {"by": "column", "column": "ignored", "train": ["a", "d"], "valid": "b", "test": "c"}
    one = prepared(tmp_path, [write_parquet(tmp_path / "a.parquet", rows)], split=fold)
    other = tmp_path / "files"
    for name, letters in (("learn", "ad"), ("valid-1", "b"), ("test-1", "c")):
        write_parquet(other / f"raw/{name}.parquet", [row for row in rows if row["ignored"] in letters])
    files = {"by": "files", "valid": "valid*", "test": ["test*"]}
    assert prepared(other, [other / "raw"], split=files).fingerprint == one.fingerprint
    assert [one.rows(s) for s in ("train", "valid", "test")] == [20, 10, 10]


def test_dates_in_any_spelling_are_the_same_moments(tmp_path):
    moments = [datetime(2024, 2, 28, 22, tzinfo=UTC) + timedelta(hours=7 * i, minutes=3) for i in range(30)]
    base = [{k: v for k, v in row.items() if k != "at"} for row in example(30)]
    spelt = {
        "timestamp": ([m.replace(tzinfo=None) for m in moments], pa.timestamp("us"), {}),
        "zoned": (moments, pa.timestamp("ns", "Europe/Berlin"), {}),
        "iso": ([m.strftime("%Y-%m-%d %H:%M:%S") for m in moments], pa.string(), {}),
        "iso zoned": ([m.strftime("%Y-%m-%dT%H:%M:%SZ") for m in moments], pa.string(), {}),
        "seconds": ([int(m.timestamp()) for m in moments], pa.int64(), {"unit": "s"}),
        "compact": ([int(m.strftime("%y%m%d%H")) for m in moments], pa.int64(), {"format": "%y%m%d%H"}),
        "float": ([m.timestamp() for m in moments], pa.float64(), {"unit": "s"}),
    }
    fingerprints = set()
    for name, (values, kind, options) in spelt.items():
        folder = tmp_path / name
        rows = [row | {"at": value} for row, value in zip(base, values, strict=True)]
        raw = write_parquet(folder / "a.parquet", rows, SCHEMA.set(8, pa.field("at", kind)))
        time = {"column": "at", "derive": ["hour", "weekday"], **options}
        fingerprints.add(prepared(folder, [raw], time=time).fingerprint)
        found = rows_of(folder / "out")
        everything = [row for split in found.values() for row in split]
        assert [(row["at_hour"], row["at_weekday"]) for row in everything] == [(m.hour, m.weekday()) for m in moments]
    assert len(fingerprints) == 1


def test_text_of_every_kind_is_read(tmp_path):
    rows = example(30)
    plain = prepared(tmp_path, [write_csv(tmp_path / "a.csv", rows)]).fingerprint
    (tmp_path / "zip").mkdir()
    assert prepared(tmp_path / "zip", [write_csv(tmp_path / "zip/a.csv.gz", rows)]).fingerprint == plain
    text = (tmp_path / "a.csv").read_text()
    tabs = tmp_path / "tsv/a.tsv"
    tabs.parent.mkdir()
    tabs.write_text(text.replace(",", "\t"))
    assert prepared(tmp_path / "tsv", [tabs]).fingerprint == plain
    bare = tmp_path / "bare/a.csv"
    bare.parent.mkdir()
    header, _, body = text.partition("\n")
    bare.write_text(body.replace(",", ";"))
    options = {"delimiter": ";", "columns": header.split(",")}
    assert prepared(tmp_path / "bare", [bare], csv=options).fingerprint == plain


def test_a_target_and_its_history_are_one_id_space(tmp_path):
    prepared(tmp_path, [write_parquet(tmp_path / "a.parquet", example(40))])
    features = {feature.name: feature for feature in read_features(tmp_path / "out")}
    assert features["item"].space == features["bought"].space == "item"
    assert features["item"].num_ids == features["bought"].num_ids
    assert features["bought"].pooling == "none"
    assert features["tags"].pooling == "mean"
    assert features["city"].id_space is None


def test_description_says_how_the_folder_was_made(tmp_path):
    rows = example(40)
    rows[5]["price"] = None
    dataset = prepared(tmp_path, [write_parquet(tmp_path / "a.parquet", rows)])
    assert Dataset.load(tmp_path / "out") == dataset
    source = dataset.source
    assert (source["kind"], source["files"], source["rows"]) == ("table", ["a.parquet"], 40)
    assert source["nulls"] == {"price": 1}
    assert source["unused"] == ["ignored"]
    assert source["options"]["split"]["valid"] == 0.2


def test_raw_ids_share_their_range_with_a_history(tmp_path):
    rows = example(40)
    rows[3]["bought"] = [77]
    raw = write_parquet(tmp_path / "a.parquet", rows)
    prepared(tmp_path, [raw], categorical={"item": {"raw": True}})
    features = {feature.name: feature for feature in read_features(tmp_path / "out")}
    assert features["item"].num_ids == features["bought"].num_ids == 78
    found = [row for split in rows_of(tmp_path / "out").values() for row in split]
    assert [row["item"] for row in found] == [row["item"] for row in rows]
    assert [row["bought"] for row in found] == [row["bought"][-3:] for row in rows]
    assert check(tmp_path / "out") == []


@small
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**63 - 1, 2**63, 2**64 - 1]), min_size=12, max_size=40)
)
def test_hashed_ids_are_all_64_bit_numbers_as_they_stand(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("hashed")
    rows = [row | {"place": n, "bought": [n, values[0]]} for row, n in zip(example(len(values)), values, strict=True)]
    schema = SCHEMA.set(4, pa.field("place", pa.uint64())).set(6, pa.field("bought", pa.list_(pa.uint64())))
    changes = {
        "categorical": {"place": {"hashed": True}},
        "history": {"bought": {"of": "place", "separator": "|"}},
        "split": {"by": "order", "valid": 0.1, "test": 0.1},
    }
    signed = [n - 2**64 if n >= 2**63 else n for n in values]
    for name, raw in (
        ("p", write_parquet(folder / "a.parquet", rows, schema)),
        ("c", write_csv(folder / "a.csv", rows)),
    ):
        (folder / name).mkdir()
        dataset = prepared(folder / name, [raw], **changes)
        found = [row for split in rows_of(folder / name / "out").values() for row in split]
        assert [row["place"] for row in found] == signed
        assert [row["bought"] for row in found] == [[n, signed[0]] for n in signed]
        sizes = {feature.name: feature.num_ids for feature in dataset.features if feature.hashed}
        assert sizes == dict.fromkeys(("place", "bought"), len(set(values)))
        assert [problem for problem in check(folder / name / "out") if not problem.warning] == []
        assert [path.stem for path in (folder / name / "out/vocab").iterdir()] == ["tags"]


def test_the_page_about_own_data_shows_files_that_are_accepted(tmp_path):
    page = Path(__file__).parents[2] / "docs/your-data.md"
    roles, sweep = (block.split("```")[0] for block in page.read_text().split("```yaml\n")[1:])
    (tmp_path / "roles.yaml").write_text(roles)
    (tmp_path / "compare.yaml").write_text(sweep)
    found = read_roles(tmp_path / "roles.yaml")
    assert found.columns.keys() >= {"clicked", "seen_at", "customer", "last_products"}
    assert read_sweep(tmp_path / "compare.yaml").data == f"data/{found.name}"


def test_from_a_folder_with_other_names_to_a_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = example(900)
    for row in rows:
        odds = 1.5 * (row["item"] % 3 - 1)
        row["clicked"] = int(rng.random() < 1 / (1 + math.exp(-odds)))
    for part in range(3):
        write_parquet(tmp_path / f"lake/part-{part}.parquet", rows[300 * part : 300 * (part + 1)], group=100)
    roles = write_roles(tmp_path / "roles.yaml", history={"bought": {"of": "item", "pooling": "mean"}})
    main(["prepare", "table", str(tmp_path / "lake"), "--roles", str(roles), "--out", str(tmp_path / "data")])
    main(["check-data", str(tmp_path / "data")])
    sweep = {
        "data": str(tmp_path / "data"),
        "methods": ["dense", "hash"],
        "budgets": ["0.5x"],
        "seeds": [0],
        "dim": 4,
        "model": {"name": "AutoInt", "attention_dim": 4, "num_layers": 1, "num_heads": 1, "dnn": []},
        "batch_size": 64,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    capsys.readouterr()
    main(["compare", "--config", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "report")])
    with (tmp_path / "report/results.csv").open(newline="") as file:
        results = {row["method"]: row for row in csv.DictReader(file)}
    assert {row["status"] for row in results.values()} == {"ok"}
    assert 0.6 < float(results["dense"]["auc"]) < 0.95
    assert int(results["hash"]["nbytes"]) < int(results["dense"]["nbytes"])
    # Again with --if-absent: nothing is done.
    before = (tmp_path / "data/dataset.json").stat().st_mtime_ns
    again = ["--roles", str(roles), "--out", str(tmp_path / "data"), "--if-absent"]
    main(["prepare", "table", str(tmp_path / "lake"), *again])
    assert (tmp_path / "data/dataset.json").stat().st_mtime_ns == before


def times(path: Path, values: pa.Array) -> Path:
    many = pa.array(["a"] * len(values))
    pq.write_table(pa.table({"y": pa.array([1.0] * len(values)), "c": many, "at": values}), path)
    return path


def test_dates_of_any_unit_are_cut_at_the_same_moments(tmp_path):
    """Whatever unit a file counts its dates in, what is later is later."""
    start = datetime(2024, 1, 1, tzinfo=UTC)
    kinds = [pa.timestamp("ns"), pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("s"), pa.date32()]
    files = [
        times(tmp_path / f"{i}.parquet", pa.array([(start + timedelta(days=i)).replace(tzinfo=None)] * 2, kind))
        for i, kind in enumerate(kinds)
    ]
    roles = {"label": "y", "categorical": "c", "time": {"column": "at", "derive": ["weekday"]}}
    roles["split"] = {"by": "time", "valid": 0.2, "test": 0.2}
    (tmp_path / "roles.yaml").write_text(yaml.safe_dump(roles))
    table.prepare(files, tmp_path / "out", roles=tmp_path / "roles.yaml")
    days = {
        split: pq.read_table(tmp_path / "out" / split)["at_weekday"].to_pylist() for split in ("train", "valid", "test")
    }
    assert days == {"train": [0, 0, 1, 1, 2, 2], "valid": [3, 3], "test": [4, 4]}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_hours_far_from_1970(tmp_path, unit):
    """Python's whole numbers have no end; the largest seconds are of the year 292 billion."""
    far = [0, -1, 2**63 - 1, -(2**63), 2**60]
    raw = times(tmp_path / "a.parquet", pa.array(far))
    roles = {"label": "y", "categorical": "c", "split": {"by": "order", "valid": 0.0, "test": 0.0}}
    roles["time"] = {"column": "at", "unit": unit, "derive": ["hour", "weekday"]}
    (tmp_path / "roles.yaml").write_text(yaml.safe_dump(roles))
    table.prepare([raw], tmp_path / "out", roles=tmp_path / "roles.yaml")
    found = pq.read_table(tmp_path / "out" / "train").to_pydict()
    hours = [moment // ({"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit] * 3600) for moment in far]
    assert found["at_hour"] == [hour % 24 for hour in hours]
    assert found["at_weekday"] == [(hour // 24 + 3) % 7 for hour in hours]
