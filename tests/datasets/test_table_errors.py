"""Every mistake is one line that names the place and the fix, and leaves nothing behind."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embtab.cli import main
from embtab.datasets import table
from embtab.datasets.roles_file import read_roles
from embtab.errors import UserError

SCHEMA = pa.schema(
    {
        "y": pa.int64(),
        "x": pa.float64(),
        "c": pa.string(),
        "n": pa.int64(),
        "m": pa.list_(pa.int64()),
        "u": pa.string(),
        "t": pa.int64(),
    }
)
ROLES = {
    "label": "y",
    "dense": "x",
    "categorical": {"c": None, "n": {"raw": True, "num_ids": 10}},
    "history": {"m": {"of": "n", "separator": "|"}},
    "user": "u",
    "time": "t",
}


def rows(count: int = 12) -> list[dict]:
    return [{"y": i % 2, "x": 1.5, "c": "a", "n": i % 4, "m": [1], "u": "v", "t": i} for i in range(count)]


def parquet(path: Path, column: str | None = None, value: object = None, kind: pa.DataType | None = None) -> Path:
    """Row groups of five; the value stands in row group 1, row 2, or everywhere where a kind is given."""
    table_rows, schema = rows(), SCHEMA
    if column is not None:
        for i, row in enumerate(table_rows):
            if kind is not None or i == 7:
                row[column] = value
        if kind is not None:
            schema = schema.set(schema.get_field_index(column), pa.field(column, kind))
    pq.write_table(pa.Table.from_pylist(table_rows, schema), path, row_group_size=5)
    return path


def roles_in(folder: Path, **changes: object) -> Path:
    file = folder / "roles.yaml"
    given = {key: value for key, value in (ROLES | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return file


def refusal(folder: Path, raw: list[Path], **changes: object) -> str:
    """What `prepare` says; nothing may be left behind."""
    file = roles_in(folder, **changes)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        table.prepare(raw, folder / "out", roles=file)
    assert sorted(folder.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


def test_the_table_itself_is_fine(tmp_path):
    table.prepare([parquet(tmp_path / "a.parquet")], tmp_path / "out", roles=roles_in(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("y", 2, "the label must be 0 or 1, got 2"),
        ("y", None, "the label must be 0 or 1, got None"),
        ("x", None, "holds a null; fill it, or say with `fill` what it becomes"),
        ("x", float("nan"), "holds a null; fill it, or say with `fill` what it becomes"),
        ("x", float("inf"), "must be a finite number, got inf"),
        ("n", None, "raw ids must be whole numbers from 0 below num_ids (10), got None"),
        ("n", -1, "raw ids must be whole numbers from 0 below num_ids (10), got -1"),
        ("n", 10, "raw ids must be whole numbers from 0 below num_ids (10), got 10"),
        ("m", [3, 10], "raw ids must be whole numbers from 0 below num_ids (10), got [3, 10]"),
        ("m", [None], "raw ids must be whole numbers from 0 below num_ids (10), got [None]"),
        ("u", None, "the user of a row must be known"),
        ("t", None, "must be a number or ISO 8601, got None"),
    ],
)
def test_a_wrong_value_is_found_where_it_is(tmp_path, column, value, message):
    found = refusal(tmp_path, [parquet(tmp_path / "a.parquet", column, value)])
    assert found == f"a.parquet, row group 1, column {column!r}, row 2: {message}"


@pytest.mark.parametrize(
    ("column", "kind", "value", "message"),
    [
        ("y", pa.string(), "1", "holds text, which the role label cannot have"),
        ("x", pa.string(), "1", "holds text, which the role dense cannot have; write numbers"),
        ("c", pa.float64(), 1.0, "holds numbers, which the role categorical cannot have"),
        ("c", pa.list_(pa.string()), ["a"], "lists are multi"),
        ("c", pa.binary(), b"a", "holds Binary, which"),
        ("n", pa.string(), "1", "leave raw out to have values numbered"),
        ("m", pa.int64(), 1, "holds whole numbers, which the role raw list cannot have"),
        ("u", pa.float64(), 1.0, "holds numbers, which the role user cannot have"),
        ("t", pa.list_(pa.int64()), [1], "holds lists of whole numbers, which the role time cannot have"),
    ],
)
def test_a_column_of_the_wrong_kind_is_refused(tmp_path, column, kind, value, message):
    found = refusal(tmp_path, [parquet(tmp_path / "a.parquet", column, value, kind)])
    assert found.startswith(f"a.parquet, column {column!r}: ")
    assert message in found


def test_a_column_that_does_not_exist(tmp_path):
    message = refusal(tmp_path, [parquet(tmp_path / "a.parquet")], categorical=["n", "city"])
    assert message == "a.parquet: has no column 'city'; there are y, x, c, n, m, u, t"


def test_files_that_differ(tmp_path):
    one, other = parquet(tmp_path / "1.parquet"), parquet(tmp_path / "2.parquet", "c", 1, pa.int32())
    assert refusal(tmp_path, [one, other]) == (
        "2.parquet, column 'c': holds whole numbers but 1.parquet text; write all files alike"
    )
    less = pq.read_table(one).drop_columns("x")
    pq.write_table(less, other)
    assert refusal(tmp_path, [one, other]) == "2.parquet: has no column 'x'; there are y, c, n, m, u, t"
    pq.write_table(pq.read_table(one).slice(0, 0), other)
    assert refusal(tmp_path, [one, other]) == "2.parquet: holds no rows; remove it or write it again"
    text = tmp_path / "3.csv"
    text.write_text("y,x\n")
    assert refusal(tmp_path, [one, text]) == "3.csv: is text but 1.parquet is Parquet; give files of one kind"


def test_a_column_without_any_value_goes_with_every_kind(tmp_path):
    files = [parquet(tmp_path / "1.parquet", "c", None, pa.null()), parquet(tmp_path / "2.parquet")]
    dataset = table.prepare(files, tmp_path / "out", roles=roles_in(tmp_path))
    assert dataset.source["rows"] == 24


def test_damaged_files(tmp_path):
    good = parquet(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(good[:-40])
    assert refusal(tmp_path, [tmp_path / "a.parquet"]).startswith("a.parquet: cannot be read: ")
    (tmp_path / "a.parquet").write_bytes(good[:30] + b"\xff" * 300 + good[330:])
    message = refusal(tmp_path, [tmp_path / "a.parquet"])
    assert message.startswith("a.parquet, row group 0, column 'y': cannot be decoded: ")
    (tmp_path / "a.parquet").write_bytes(b"y,x\n1,2\n")
    assert "is not a Parquet file, in spite of its name" in refusal(tmp_path, [tmp_path / "a.parquet"])
    (tmp_path / "a.parquet").write_bytes(b"")
    assert refusal(tmp_path, [tmp_path / "a.parquet"]) == "a.parquet: is empty; remove it or write it again"
    assert refusal(tmp_path, [tmp_path / "b"]) == "b: no such file or folder"
    (tmp_path / "none").mkdir()
    assert refusal(tmp_path, [tmp_path / "none"]).startswith("none: holds no tables; files must end in .parquet")


HEAD = b"y,x,c,n,m,u,t\n"
GOOD = b"1,2.5,a,3,1|2,v,17\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (HEAD, "holds no rows"),
        (HEAD + GOOD * 3 + b"1,2\n" + GOOD, ", line 5: has 2 columns, not 7: '1,2'"),
        (HEAD + GOOD + b"1,\xff\n" + GOOD, ", line 3: has 2 columns, not 7: '1,\ufffd'"),
        (
            HEAD + GOOD.replace(b"a", b"a" * 200) + GOOD.replace(b"a", b"a" * 200 + b","),
            ", line 3: has 8 columns, not 7",
        ),
        (HEAD + GOOD + GOOD.replace(b"a", b"\xff"), ", line 3: is not valid UTF-8"),
        (HEAD + GOOD + GOOD.replace(b"2.5", b"NA"), ", line 3, column 'x': must be a number or blank, got 'NA'"),
        (HEAD + GOOD + GOOD.replace(b"2.5", b""), ", line 3, column 'x': holds a null"),
        (HEAD + GOOD + b"yes" + GOOD[1:], ", line 3, column 'y': the label must be 0 or 1, got 'yes'"),
        (HEAD + GOOD * 2 + GOOD.replace(b",3,", b",3.0,"), ", line 4, column 'n': raw ids must be whole numbers"),
        (HEAD + GOOD + GOOD.replace(b"17", b"2024-01-01"), ", line 3, column 't': must be a number or ISO 8601"),
        (HEAD.replace(b"c", b"x") + GOOD, "column 'x' stands twice"),
        (b"\x1f\x8b" + HEAD, "cannot be read"),
    ],
)
def test_text_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    assert message in refusal(tmp_path, [tmp_path / "a.csv"])


def test_a_late_line_of_text_is_found(tmp_path):
    many = 400_000  # more than one block
    (tmp_path / "a.csv").write_bytes(HEAD + GOOD * many + GOOD.replace(b"1,2.5", b"7,2.5"))
    assert f"a.csv, line {many + 2}, column 'y'" in refusal(tmp_path, [tmp_path / "a.csv"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "key 'label' is missing; name the column that holds 0 or 1"),
        ({"lable": "y"}, "unknown key 'lable'; there are name, label,"),
        ({"label": "u"}, "column 'u' is the label and can have no other role"),
        ({"categorical": ["n", "x"]}, "column 'x' is given the roles dense and categorical"),
        ({"categorical": ["n", "n"]}, "column 'n' is given the roles categorical and categorical"),
        ({"categorical": ["n", True]}, "categorical: expected a name, got True"),
        ({"categorical": ["n", "a/b"]}, "column 'a/b': such a name cannot be used here"),
        ({"categorical": {"n": {"mincount": 2}}}, "unknown option 'mincount'; there are min_count, raw"),
        ({"categorical": {"n": {"min_count": "2"}}}, "categorical column 'n': min_count must be int, got '2'"),
        ({"categorical": {"n": {"min_count": 0}}}, "categorical column 'n': min_count must be 1 or more, got 0"),
        ({"categorical": {"n": {"num_ids": 9}}}, "num_ids goes with raw: true"),
        ({"categorical": "n", "multi": {"c": {"pooling": "max"}}}, "multi column 'c': pooling must be sum or mean"),
        ({"history": "m"}, "history column 'm': give `of`"),
        ({"history": {"m": {"of": "z"}}}, "of 'z' is no categorical column; there are c, n"),
        ({"multi": {"z": {"of": "n", "raw": True}}}, "multi column 'z': raw is that of 'n'"),
        ({"categorical": None, "history": None}, "there is nothing to embed"),
        ({"dense": {"x": "sqrt"}}, "transform must be one of log, log1p, none; got 'sqrt'"),
        ({"dense": {"x": {"fill": float("inf")}}}, "dense column 'x': fill must be a finite float32 number"),
        ({"dense": {"x": {"fill": 1e39}}}, "dense column 'x': fill must be a finite float32 number"),
        ({"history": {"m": {"of": "n", "max_length": 10**30}}}, "history column 'm': max_length must be below 2^31"),
        ({"time": {"column": "t", "derive": "minute"}}, "derive knows hour, weekday; got 'minute'"),
        ({"time": {"column": "t", "unit": "days"}}, "unit must be one of s, ms, us, ns; got 'days'"),
        ({"time": None, "split": "time"}, "split by time: key 'time' is missing"),
        ({"split": "day"}, "'by' must be one of time, random, order, column, files"),
        ({"split": {"by": "random", "sede": 1}}, "split by random: unknown option 'sede'; there are valid, test, seed"),
        ({"split": {"by": "time", "valid": 0.6, "test": 0.4}}, "leave no rows for training"),
        ({"split": {"by": "column"}}, "split: column: expected a name, got None"),
        ({"split": {"by": "column", "column": "c", "valid": "a", "test": "a"}}, "'a' is named by two splits"),
        ({"csv": {"delimiter": "::"}}, "csv: delimiter must be one character, got '::'"),
    ],
)
def test_a_mistake_in_the_roles_is_said_before_any_file_is_read(tmp_path, changes, message):
    found = refusal(tmp_path, [tmp_path / "absent.parquet"], **changes)
    assert found.startswith("roles.yaml: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: y\ncategorical: n\nlabel: c\n", "line 3: 'label' stands twice; give it one role"),
        ("label: y\ncategorical: {n: , n: }\n", "line 2: 'n' stands twice"),
        ("label: [y\n", "cannot be read as YAML"),
        ("- y\n", "expected keys such as label"),
        ("? [a]\n: y\n", "a key must be a name"),
    ],
)
def test_a_file_that_is_no_roles(tmp_path, text, message):
    (tmp_path / "roles.yaml").write_text(text)
    with pytest.raises(UserError, match=r"roles\.yaml: ") as caught:
        read_roles(tmp_path / "roles.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"by": "column", "column": "c"}}, "names no split; there are train, valid, test, got 'a'"),
        ({"split": {"by": "column", "column": "c", "train": [], "valid": "a"}}, "no row falls into train"),
        ({"split": {"by": "files", "test": "t*"}}, "no file is named 't*'; there are a.parquet"),
        ({"split": {"by": "files", "valid": "a*", "test": "*.parquet"}}, "a.parquet: two splits name it"),
        ({"split": {"by": "time", "valid": 0.5, "test": 0.49}}, "are too few"),
        ({"time": {"column": "n", "derive": "hour"}}, "is a number; say with `unit` or `format` what it counts"),
        ({"time": {"column": "t", "format": "%Y"}}, "must be a time written as %Y"),
    ],
)
def test_a_split_or_time_that_the_table_cannot_have(tmp_path, changes, message):
    assert message in refusal(tmp_path, [parquet(tmp_path / "a.parquet")], **changes)


def test_raw_ids_that_no_table_could_hold(tmp_path):
    raw = parquet(tmp_path / "a.parquet", "n", 2**40)
    message = refusal(tmp_path, [raw], categorical={"n": {"raw": True}})
    assert message == f"column 'n': raw ids up to {2**40} are too large; leave raw out to number them"


@pytest.mark.parametrize("times", [[5] * 12, [0, 1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9]])
def test_rows_of_one_moment_are_not_torn_apart(tmp_path, times):
    timed = [row | {"t": time} for row, time in zip(rows(), times, strict=True)]
    pq.write_table(pa.Table.from_pylist(timed, SCHEMA), tmp_path / "a.parquet")
    split = {"by": "time", "valid": 0.2, "test": 0.2}
    assert "too many rows are of one moment" in refusal(tmp_path, [tmp_path / "a.parquet"], split=split)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    raw = parquet(tmp_path / "a.parquet", "y", 3)
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "table", str(raw), "--roles", str(roles_in(tmp_path)), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("a.parquet, row group 1, column 'y', row 2: the label must be 0 or 1, got 3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pa.float64(), float("inf")), (pa.float64(), 1e300), (pa.uint64(), 2**64 - 1), (pa.string(), "1e40")],
)
def test_a_time_beyond_all_numbers(tmp_path, kind, value):
    raw = parquet(tmp_path / "a.parquet", "t", value, kind)
    time = {"column": "t", "unit": "s", "derive": "hour"}
    assert "a.parquet, row group 0, column 't', row 0: must be a number or ISO" in refusal(tmp_path, [raw], time=time)


def test_text_that_is_not_utf8_is_refused_in_parquet_too(tmp_path):
    spoilt = pa.array([b"\xff\xfe"] * 12).view(pa.string())
    table_of_c = pq.read_table(parquet(tmp_path / "a.parquet"))
    pq.write_table(table_of_c.set_column(2, "c", spoilt), tmp_path / "a.parquet", row_group_size=5)
    assert "a.parquet, row group 0, column 'c': cannot be decoded" in refusal(tmp_path, [tmp_path / "a.parquet"])


def test_a_message_stays_on_one_line_whatever_a_column_is_called(tmp_path, capsys):
    pq.write_table(pa.table({"two\nlines": [1]}), tmp_path / "a.parquet")
    raw, roles = str(tmp_path / "a.parquet"), str(roles_in(tmp_path))
    with pytest.raises(SystemExit):
        main(["prepare", "table", raw, "--roles", roles, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.splitlines()[-1].endswith("has no column 'y'; there are two lines")


def test_types_that_polars_does_not_know_matter_only_where_they_are_read(tmp_path):
    wide = pa.decimal256(60, 0)
    raw = parquet(tmp_path / "a.parquet")
    pq.write_table(pq.read_table(raw).append_column("unread", pa.nulls(12, wide)), raw)
    table.prepare([raw], tmp_path / "fine", roles=roles_in(tmp_path))
    message = refusal(tmp_path, [parquet(tmp_path / "a.parquet", "x", None, wide)])
    assert message.startswith("a.parquet, column 'x': holds Unknown, which the role dense cannot have")


def test_a_table_of_very_many_columns_is_not_listed_in_full(tmp_path):
    pq.write_table(pa.table({f"column {i}": [1] for i in range(1000)}), tmp_path / "a.parquet")
    message = refusal(tmp_path, [tmp_path / "a.parquet"])
    assert "there are column 0, column 1, " in message
    assert len(message) < 400
