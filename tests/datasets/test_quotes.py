"""No line of a text is swallowed by a quote without a word, and quotes are read as the roles say."""

import csv
import gzip
import io
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from embtab.datasets import quotes
from embtab.datasets.quotes import RowBlocks
from embtab.datasets.roles import Csv
from embtab.datasets.table_files import find_files
from embtab.errors import DataError

DEFAULT = Csv()
SPARK = Csv(escape="\\")
PLAIN = Csv(quote="")


def read(text: str | bytes, folder: Path, name: str = "rows.csv", asked: Csv = DEFAULT) -> list[list[str]]:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    (found,) = find_files([file], asked)
    with tqdm(disable=True) as bar:
        pieces = [piece.rows for piece in found.pieces(list(found.columns), asked, bar)]
    return [list(row) for row in pl.concat(pieces).rows()]


def lines(count: int, delimiter: str = "\t") -> list[str]:
    return [delimiter.join(["y", "a", "text"]), *(delimiter.join([f"{i % 2}", f"a{i}", f"t{i}"]) for i in range(count))]


@pytest.mark.parametrize(("delimiter", "name"), [("\t", "rows.tsv"), (",", "rows.csv"), (";", "rows.csv")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("apart", [1, 4])
def test_a_quote_that_swallows_lines_is_refused_by_its_line(
    delimiter: str, name: str, end: str, apart: int, tmp_path: Path
) -> None:
    rows, asked = lines(20, delimiter), Csv(delimiter)
    rows[5] = delimiter.join(["0", "a4", '"Hello'])
    rows[5 + apart] = delimiter.join(["0", "a8", 'Goodbye"'])
    with pytest.raises(DataError, match=rf"line 6: a quote holds {apart + 1} lines together, .*Hello.*quote: ''"):
        read(end.join([*rows, ""]), tmp_path, name, asked)
    plain = read(end.join([*rows, ""]), tmp_path, name, Csv(delimiter, quote=""))
    assert plain == [row.split(delimiter) for row in rows[1:]]
    held = read(end.join([*rows, ""]), tmp_path, name, Csv(delimiter, quote='"'))
    assert len(held) == 20 - apart


@pytest.mark.parametrize("value", ['"Hello', '"Hello" you', '"a "b" c"', '"say \\"hi\\""', '"'])
def test_a_quote_that_does_not_end_its_value_is_refused_by_its_line(value: str, tmp_path: Path) -> None:
    rows = lines(6, ",")
    rows[3] = f"0,a2,{value}"
    with pytest.raises(DataError, match=r"line 4: a quote.* say csv: \{quote: ''\}"):
        read("\n".join([*rows, ""]), tmp_path)
    assert read("\n".join([*rows, ""]), tmp_path, asked=PLAIN)[2] == ["0", "a2", value]


def test_quotes_within_plain_values_are_text(tmp_path: Path) -> None:
    rows = [*lines(3), '1\t5" disk\tsay "hi"']
    assert read("\n".join(rows), tmp_path, "rows.tsv")[-1] == ["1", '5" disk', 'say "hi"']


def test_backslashes_before_quotes_as_spark_writes_them(tmp_path: Path) -> None:
    text = 'y,text,a\n1,"say \\"hi\\", you",b\n0,"",c\n1,"\\"",d\n0,plain,"e"\n'
    assert read(text, tmp_path, asked=SPARK) == [
        ["1", 'say "hi", you', "b"],
        ["0", "", "c"],
        ["1", '"', "d"],
        ["0", "plain", "e"],
    ]


def test_values_over_lines_are_kept_where_they_can_be_no_rows(tmp_path: Path) -> None:
    rows = [["y", "text", "a"], ["1", "one\ntwo, three, four\nfive", "b"], ["0", 'a "quoted"\r\n\n', "c"]]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    assert read(text.getvalue(), tmp_path) == rows[1:]


@given(
    st.lists(st.lists(st.text('ab,"\n\té', max_size=5), min_size=3, max_size=3), min_size=1, max_size=8),
    st.sampled_from([",", "\t"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.integers(1, 20),
)
def test_what_a_writer_of_csv_wrote_comes_through_in_parts_of_any_size(rows, delimiter, quoting, size) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows(rows)
    source = io.BytesIO(text.getvalue().encode())
    blocks = list(RowBlocks(source, Path("x"), delimiter, Csv(quote='"'), 3, size))
    assert b"".join(blocks).decode() == text.getvalue()
    parts = [csv.reader(io.StringIO(block.decode(), newline=""), delimiter=delimiter) for block in blocks]
    assert [row for part in parts for row in part if row] == rows


@given(st.text('ab,"\n', max_size=30), st.integers(1, 12))
def test_a_text_is_judged_alike_in_parts_of_any_size(text: str, size: int) -> None:
    def judged(size: int) -> str | None:
        try:
            assert b"".join(RowBlocks(io.BytesIO(text.encode()), Path("x"), ",", Csv(), 2, size)).decode() == text
        except DataError as error:
            return str(error).split(": '")[0].split(': "')[0]  # what is shown of the line may be cut
        return None

    assert judged(size) == judged(1000)


@given(st.lists(st.lists(st.text('ab"', max_size=3), min_size=2, max_size=2), min_size=1, max_size=8))
def test_text_without_quoting_is_read_in_full_or_refused(tmp_path_factory, rows: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("plain")
    text = "\n".join(["x\ty", *(f"{a}-\t-{b}-" if a else f"-\t{b}-" for a, b in rows), ""])
    try:
        found = read(text, folder, "rows.tsv")
    except DataError:
        return
    assert len(found) == len(rows)


def test_a_quote_that_never_ends_is_refused_before_it_fills_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotes, "LONGEST", 1000)
    blocks = RowBlocks(io.BytesIO(b'a,b\n1,"' + b"x" * 5000), Path("x"), ",", Csv(), 2, 100)
    with pytest.raises(DataError, match="line 2: a row does not end within"):
        list(blocks)


@pytest.mark.parametrize("damage", ["gzip", "columns", "quote"])
def test_a_damaged_file_ends_the_command_by_its_message(damage: str, tmp_path: Path) -> None:
    text = "\n".join(lines(400_000, ",")).encode()
    file = tmp_path / "rows.csv"
    if damage == "gzip":
        packed = bytearray(gzip.compress(text, 1))
        packed[len(packed) // 2 :] = bytes(1000)
        file = tmp_path / "rows.csv.gz"
        file.write_bytes(packed)
    else:
        file.write_bytes(text[: len(text) // 2] + (b"\n1,2,3,4,5\n" if damage == "columns" else b'\n1,"2,3\n') + text)
    (tmp_path / "roles.yaml").write_text("{label: y, categorical: [a], split: random}")
    command = [sys.executable, "-m", "embtab", "prepare", "table", file, "--roles", tmp_path / "roles.yaml"]
    done = subprocess.run([*map(str, command), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"embtab: error: {file}, line ")
