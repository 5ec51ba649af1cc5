"""Tables as they lie in lakes: columns in names of folders, logs of deleted rows, zones, odd types, long values."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embtab.cli import main
from embtab.datasets import table, table_parquet
from embtab.datasets.roles import Csv
from embtab.datasets.schema import Dataset
from embtab.datasets.table_files import find_files
from embtab.errors import DataError

ROLES = {"label": "y", "categorical": ["c"], "split": "order"}


def prepared(raw: Path | list[Path], out: Path, roles: dict) -> tuple[Dataset, pl.DataFrame]:
    """The dataset, and its rows with values instead of ids."""
    file = out.parent / "roles.yaml"
    file.write_text(yaml.safe_dump(roles, sort_keys=False))
    made = table.prepare(raw if isinstance(raw, list) else [raw], out, roles=file)
    rows = pl.concat([pl.read_parquet(out / part.path) for part in made.files])
    for feature in made.features:
        if (out / "vocab" / f"{feature.name}.parquet").exists():
            values = pl.read_parquet(out / "vocab" / f"{feature.name}.parquet")
            if "value" in values.columns:
                rows = rows.with_columns(pl.Series(feature.name, [values["value"][i] for i in rows[feature.name]]))
    return made, rows


def write(file: Path, kind: str, **columns: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.table(columns), file)
    else:
        pl.DataFrame(columns).write_csv(file)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_columns_in_names_of_folders(kind: str, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for day in (1, 2, 10):
        for city in ("S%C3%A3o%20Paulo", "a%2Fb%3D1", "__HIVE_DEFAULT_PARTITION__"):
            folder = lake / f"day={day}" / f"city={city}"
            write(folder / f"part-0.{kind}", kind, y=[0, 1] * 5, c=["u", "v"] * 5)
    roles = {**ROLES, "categorical": {"c": None, "city": {"min_count": 1}, "day": {"min_count": 1}}}
    _, rows = prepared(lake, tmp_path / "out", {**roles, "split": {"by": "random", "valid": 0}})
    wanted = [
        {"c": c, "city": city, "day": str(day)}
        for day in (1, 2, 10)
        for city in ("São Paulo", "", "a/b=1")
        for c in ["u", "v"] * 5
    ]
    key = ["day", "city", "c"]
    assert rows.select("c", "city", "day").sort(key).to_dicts() == pl.DataFrame(wanted).sort(key).to_dicts()
    by_time = {**roles, "time": "day", "split": {"by": "time", "valid": 0, "test": 0.3}}
    made, rows = prepared(lake, tmp_path / "cut", by_time)
    assert made.rows("test") == 30
    assert rows["day"].to_list() == ["1"] * 30 + ["2"] * 30 + [None] * 30  # days are numbers, and the tenth is new


def test_a_folders_value_may_be_the_label_or_a_raw_id_and_the_files_own_column_goes_first(tmp_path: Path) -> None:
    for y in (0, 1):
        write(tmp_path / "lake" / f"y={y}" / "shop=7" / "p.parquet", "parquet", c=["a", "b"] * 5, shop=[3] * 10)
    roles = {"label": "y", "categorical": {"c": None, "shop": {"raw": True}}, "split": "random"}
    made, rows = prepared(tmp_path / "lake", tmp_path / "out", roles)
    assert sorted(rows["label" if "label" in rows.columns else "y"].to_list()) == [0.0] * 10 + [1.0] * 10
    assert rows["shop"].unique().to_list() == [3]
    assert made.features[1].num_ids == 4


def test_text_and_numbers_of_folders_are_told_apart_by_all_of_them(tmp_path: Path) -> None:
    for value in ("01", "2"):
        write(tmp_path / "lake" / f"k={value}" / "p.parquet", "parquet", y=[0, 1], c=["a", "b"])
    files = find_files([tmp_path / "lake"], Csv())
    assert [file.partition for file in files] == [{"k": "01"}, {"k": "2"}]
    with pytest.raises(DataError, match=r"column 'day'; there are y, c, k"):
        prepared(tmp_path / "lake", tmp_path / "out", {**ROLES, "categorical": ["c", "day"]})


@pytest.mark.parametrize(
    ("log", "kind"),
    [("_delta_log/0.json", "Delta Lake"), ("metadata/v1.metadata.json", "Iceberg"), (".hoodie/x", "Hudi")],
)
def test_tables_that_keep_deleted_rows_are_refused(log: str, kind: str, tmp_path: Path) -> None:
    part = tmp_path / "lake" / "deep" / "day=1" / "part-0.parquet"
    write(part, "parquet", y=[0, 1] * 50, c=["a", "b"] * 50)
    prepared(tmp_path, tmp_path / "before", ROLES)
    (tmp_path / "lake" / log).parent.mkdir()
    (tmp_path / "lake" / log).write_text("{}")
    for raw in (tmp_path / "lake", tmp_path / "lake" / "deep", part):
        with pytest.raises(DataError, match=f"lake: is a {kind} table, whose files also hold rows that were deleted"):
            prepared(raw, tmp_path / "out", ROLES)
    assert not (tmp_path / "out").exists()


MOMENTS = [datetime(2024, 3, 1, 22, 10, tzinfo=UTC) + timedelta(minutes=53 * i) for i in range(40)]


@pytest.mark.parametrize("zone", ["+05:30", "-08:00", "UTC", "Europe/Berlin", "+00:00"])
def test_zones_of_parquet_show_the_same_moments(zone: str, tmp_path: Path) -> None:
    at = pa.array(MOMENTS, pa.timestamp("us", "UTC")).cast(pa.timestamp("us", zone))
    pq.write_table(pa.table({"y": [0, 1] * 20, "c": ["a", "b"] * 20, "at": at}), tmp_path / "rows.parquet")
    roles = {**ROLES, "time": {"column": "at", "derive": ["hour"]}}
    _, rows = prepared(tmp_path / "rows.parquet", tmp_path / "out", roles)
    assert rows["at_hour"].to_list() == [moment.hour for moment in MOMENTS]


@pytest.mark.parametrize(
    ("form", "end", "shift"),
    [
        ("%Y-%m-%d %H:%M:%S", " UTC", 0),
        ("%Y-%m-%d %H:%M:%S", " GMT", 0),
        ("%Y-%m-%dT%H:%M:%S", "z", 0),
        ("%Y-%m-%d %H:%M:%S", "+00", 0),
        ("%Y-%m-%d %H:%M:%S.%f", "-03", -3),
        ("%Y-%m-%d %H:%M:%S", " +05:30", 5.5),
        ("%Y-%m-%dT%H:%M:%S", "+0530", 5.5),
        ("%Y-%m-%d %H:%M", "+05:30", 5.5),
        ("%Y-%m-%d %H:%M", "", 0),
    ],
)
def test_zones_of_text_are_heeded(form: str, end: str, shift: float, tmp_path: Path) -> None:
    at = [(moment + timedelta(hours=shift)).strftime(form) + end for moment in MOMENTS]
    write(tmp_path / "rows.csv", "csv", y=[0, 1] * 20, c=["a", "b"] * 20, at=at)
    roles = {**ROLES, "time": {"column": "at", "derive": ["hour"]}}
    _, rows = prepared(tmp_path / "rows.csv", tmp_path / "out", roles)
    assert rows["at_hour"].to_list() == [moment.hour for moment in MOMENTS]


def test_a_zone_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", "csv", y=[0, 1] * 20, c=["a", "b"] * 20, at=["2024-01-01 10:00:00 Mars"] * 40)
    with pytest.raises(
        DataError, match="line 2, column 'at': must be a number or ISO 8601, got '2024-01-01 10:00:00 Mars"
    ):
        prepared(tmp_path / "rows.csv", tmp_path / "out", {**ROLES, "time": "at"})


ODD = {
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((40, 2, 2), np.float32)),
    "decimal": pa.array([None] * 40, pa.decimal256(50, 3)),
    "map": pa.array([[("k", 1)]] * 40, pa.map_(pa.string(), pa.int64())),
    "duration": pa.array([1] * 40, pa.duration("s")),
    "time": pa.array([1] * 40, pa.time64("us")),
    "lists": pa.array([[[1]]] * 40),
    "struct": pa.array([{"a": 1}] * 40),
    "nothing": pa.nulls(40),
}


@pytest.mark.parametrize("odd", ODD)
def test_columns_of_odd_types_matter_only_where_they_have_a_role(odd: str, tmp_path: Path) -> None:
    columns = {"y": pa.array([0, 1] * 20), "c": pa.array(["a", "b"] * 20), odd: ODD[odd]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    _, rows = prepared(tmp_path / "rows.parquet", tmp_path / "out", ROLES)
    assert rows["c"].to_list() == ["a", "b"] * 20
    if odd != "nothing":
        with pytest.raises(DataError, match=f"column '{odd}': holds .*, which the role categorical cannot have"):
            prepared(tmp_path / "rows.parquet", tmp_path / "again", {**ROLES, "categorical": ["c", odd]})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_parquet, "BYTES", 2_000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_long_values_are_read_in_pieces_of_bounded_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["", "x" * 900, "y" * 300, None, "z"]
    text = [words[i] for i in rng.integers(0, 5, 300)]
    lists = [None if i % 7 == 0 else [words[k] for k in rng.integers(0, 5, i % 4)] for i in range(300)]
    columns = {"n": pa.array(range(300)), "a.b": pa.array(text, kind), "l": pa.array(lists, pa.list_(kind))}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=200)
    found = []
    for group in (0, 1):
        for piece in table_parquet.pieces(tmp_path / "rows.parquet", group, ["l", "n", "a.b"]):
            held = piece["a.b"].str.len_bytes().sum() + piece["l"].list.explode().str.len_bytes().sum()
            assert held <= 4_000 or piece.height == 1
            found += piece.rows()
    assert [(n, text, lists) for lists, n, text in found] == list(zip(range(300), text, lists, strict=True))


def test_a_small_file_of_long_values_takes_little_memory(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([long])).cast(pa.string())
    pq.write_table(pa.table({"y": [0, 1] * 500, "c": values}), tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 100_000
    pq.write_table(pa.table({"y": [0, 1] * 500, "c": ["x"] * 1000}), tmp_path / "short.parquet")
    (tmp_path / "roles.yaml").write_text(yaml.safe_dump(ROLES))
    program = "import resource, sys; from embtab.cli import main; main(sys.argv[1:]); "
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for name in ("short", "rows"):
        command = [sys.executable, "-c", program, "prepare", "table", tmp_path / f"{name}.parquet"]
        command += ["--roles", tmp_path / "roles.yaml", "--out", tmp_path / name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 500, peaks  # megabytes; the column holds a thousand


def test_a_warning_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.csv", "csv", y=[0, 1] * 18 + [0] * 4, c=["a", "b"] * 20)
    prepared(tmp_path / "rows.csv", tmp_path / "out", {**ROLES, "split": {"by": "order", "valid": 0, "test": 0.1}})
    main(["check-data", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "warning: " in shown
    assert "can be used; " in shown
