"""CSV and Parquet files, read piece by piece; every value can be named by its place."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from csv import QUOTE_MINIMAL, QUOTE_NONE, reader
from csv import Error as CsvError
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat, takewhile
from pathlib import Path
from typing import BinaryIO, Literal, cast

import polars as pl
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from embtab.datasets import table_parquet
from embtab.datasets.ahead import ahead
from embtab.datasets.criteo import numeric_order
from embtab.datasets.quotes import RowBlocks
from embtab.datasets.roles import Csv
from embtab.datasets.table_folders import Value, partitions, refuse_versioned, with_constants
from embtab.errors import DataError, shown

SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a file; `first` is the number of the first one.

    Rows of Parquet count from 0 in their row group. Those of text are lines: the header is line 1. (Blank lines, and
    line breaks within quotes, are not counted.)
    """

    rows: pl.DataFrame
    file: Path
    row_group: int | None
    first: int

    def column(self, name: str) -> pl.Series:
        """A column under a plain name, for polars takes some names for patterns; see `exactly`."""
        return self.rows[name].alias("value")

    def place(self, column: str, row: int) -> str:
        """Where a value is, for people."""
        if self.row_group is None:
            return f"{self.file}, line {self.first + row}, column {column!r}"
        return f"{self.file}, row group {self.row_group}, column {column!r}, row {self.first + row}"


@dataclass(frozen=True)
class TableFile:
    """A file whose kind and columns are known."""

    path: Path
    name: str
    """Its path below the folder it was found in, else its name."""
    is_parquet: bool
    columns: dict[str, pl.DataType]
    partition: Mapping[str, Value] = field(default_factory=dict)
    """Columns whose values the names of its folders say, as in `day=1/part-0.parquet`."""

    @property
    def _own(self) -> list[str]:
        """The columns that lie in the file itself."""
        return [name for name in self.columns if name not in self.partition]

    def pieces(self, wanted: Sequence[str], csv: Csv, bar: tqdm) -> Iterator[Piece]:
        """The wanted columns, of at most some ten thousand rows at a time; the bar advances by bytes of the file.

        Raises:
            DataError: when the file cannot be decoded, or holds no rows.
        """
        read = self._of_parquet if self.is_parquet else self._of_text
        # Of a file that has none of them one is read for its number of rows.
        own = [name for name in wanted if name not in self.partition] or self._own[:1]
        constants = {name: self.partition[name] for name in wanted if name in self.partition}
        rows = 0
        for piece in read(own, csv, bar):
            rows += piece.rows.height
            yield replace(piece, rows=with_constants(piece.rows, constants)) if constants else piece
        if not rows:
            raise DataError(f"{self.path}: holds no rows; remove it or write it again")

    def _of_parquet(self, wanted: list[str], _: Csv, bar: tqdm) -> Iterator[Piece]:
        group = 0
        try:
            groups = pq.read_metadata(self.path).num_row_groups
            for group in range(groups):
                first = 0
                for rows in table_parquet.pieces(self.path, group, wanted):
                    yield Piece(rows, self.path, group, first)
                    first += rows.height
                bar.update(self.path.stat().st_size // groups)
        except (pa.ArrowException, OSError) as error:
            place = f"{self.path}, row group {group}, column {self._unreadable(group, wanted)}"
            raise DataError(f"{place}: cannot be decoded: {_line(error)}; write the file again") from error

    def _unreadable(self, group: int, wanted: Sequence[str]) -> str:
        for column in wanted:
            try:
                with pq.ParquetFile(self.path) as file:
                    file.read_row_group(group, columns=[column]).validate(full=True)
            except (pa.ArrowException, OSError):
                return repr(column)
        return "unknown"

    def _of_text(self, wanted: list[str], csv: Csv, bar: tqdm) -> Iterator[Piece]:
        first, seen = (1 if csv.columns else 2), 0
        with self.path.open("rb") as disk:
            for rows in self._parsed(disk, wanted, csv, first):
                yield Piece(rows, self.path, None, first)
                first += rows.height
                bar.update(disk.tell() - seen)
                seen = disk.tell()

    def _parsed(self, disk: BinaryIO, wanted: list[str], csv: Csv, first: int) -> Iterator[pl.DataFrame]:
        """Block by block: pyarrow's reader of streams calls Python from a thread that outlives an error, and aborts."""
        path, rows, delimiter = self.path, first, _delimiter(self.path, csv)
        convert = pc.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
        )
        parse = pc.ParseOptions(
            delimiter=delimiter,
            quote_char=False if csv.quote == "" else '"',
            double_quote=csv.escape is None,
            escape_char=csv.escape or False,
            newlines_in_values=csv.quote != "",
        )
        try:
            header = 0 if csv.columns else 1
            blocks = iter(RowBlocks(_unpacked(disk), path, delimiter, csv, len(self._own)))
            for block in takewhile(len, ahead(repeat(partial(next, blocks, b"")), 1)):
                read = pc.ReadOptions(block_size=len(block) + 1, column_names=self._own, skip_rows_after_names=header)
                found = pl.DataFrame(pl.from_arrow(pc.read_csv(pa.py_buffer(block), read, parse, convert)))
                header = 0
                if found.height:
                    yield found
                rows += found.height
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            place, message = f"{path}, line {rows} or below", f"cannot be read as text: {_line(error)}"
            if uneven := re.search(r"Expected (\d+) columns, got (\d+): (.*)", str(error), re.DOTALL):
                message = f"has {uneven[2]} columns, not {uneven[1]}: {shown(uneven[3])}"
                place = _place(path, partial(_has_columns, int(uneven[2]), path, csv, uneven[3])) or place
            elif "UTF8" in str(error):
                message = "is not valid UTF-8; write the text in that encoding"
                place = _place(path, lambda line: "\ufffd" in line.decode(errors="replace")) or place
            raise DataError(f"{place}: {message}") from error


def find_files(raw: Sequence[Path], csv: Csv) -> list[TableFile]:
    """The files of a table, in reading order: folders stand for the files below them, in numeric order of their names.

    Raises:
        DataError: for a path that does not exist, a folder without tables, a table that keeps deleted rows, text
            beside Parquet, or an unreadable file.
    """
    found: list[tuple[Path, str]] = []
    for path in raw:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found += _below(path) if path.is_dir() else [(path, path.name)]
    if not found:
        raise DataError("no files are given")
    refuse_versioned([path for path, _ in found])
    with tqdm(found, desc="opening", unit="file", disable=len(found) < 100) as bar:
        files = [_opened(path, name, csv) for path, name in bar]
    for i, partition in enumerate(partitions([path for path, _ in found])):
        own = {name: value for name, value in partition.items() if name not in files[i].columns}
        types = pl.DataFrame({name: [value] for name, value in own.items()}).schema
        files[i] = replace(files[i], columns={**files[i].columns, **types}, partition=own)
    for file in files:
        if file.is_parquet != files[0].is_parquet:
            kinds = ("text", "Parquet") if files[0].is_parquet else ("Parquet", "text")
            raise DataError(f"{file.path}: is {kinds[0]} but {files[0].path} is {kinds[1]}; give files of one kind")
    return files


def _below(folder: Path) -> list[tuple[Path, str]]:
    """The tables of a folder; files that begin with a dot or underscore are notes of whoever wrote it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES)]
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    shown = [path for path in paths if not any(part.startswith((".", "_")) for part in names[path].split("/"))]
    if not shown:
        raise DataError(f"{folder}: holds no tables; files must end in {', '.join(SUFFIXES)}")
    in_order = sorted(shown, key=lambda path: [numeric_order(step) for step in names[path].split("/")])
    return [(path, names[path]) for path in in_order]


def _opened(path: Path, name: str, csv: Csv) -> TableFile:
    try:
        with path.open("rb") as disk:
            is_parquet = disk.read(4) == b"PAR1"
            disk.seek(0)
            if is_parquet:
                schema = pq.read_schema(path)
                names = schema.names
            elif path.stat().st_size == 0:
                raise DataError(f"{path}: is empty; remove it or write it again")
            elif path.suffix.lower() in (".parquet", ".pq"):
                raise DataError(f"{path}: is not a Parquet file, in spite of its name; write it again")
            else:
                text = io.TextIOWrapper(_unpacked(disk), encoding="utf-8-sig", errors="replace", newline="")
                names = csv.columns or _first_row(text, path, csv)
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError, CsvError) as error:
        raise DataError(f"{path}: cannot be read: {_line(error)}") from error
    if twice := [column for column in names if list(names).count(column) > 1]:
        raise DataError(f"{path}: column {twice[0]!r} stands twice; rename one")
    if is_parquet:
        return TableFile(path, name, True, _types(schema))
    return TableFile(path, name, False, dict.fromkeys(names, pl.String()))


def _types(schema: pa.Schema) -> dict[str, pl.DataType]:
    """The columns' types; unknown where polars has none and panics, which matters where such a column is read."""
    known = pa.schema([field for field in schema if _is_known(field.type)])
    types = pl.DataFrame(pl.from_arrow(table_parquet.in_utc(known.empty_table()))).schema
    return {**dict.fromkeys(schema.names, pl.Unknown()), **types}


def _is_known(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_union(kind) or pa.types.is_run_end_encoded(kind):
        return False
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return "decimal256" not in str(kind) and "interval" not in str(kind) and all(map(_is_known, inner))


def _has_columns(count: int, path: Path, csv: Csv, text: str, line: bytes) -> bool:
    """Whether a line begins as pyarrow quotes it (not always in full), and has so many columns."""
    found = line.decode(errors="replace").rstrip("\r\n")
    return found.startswith(text[:90]) and len(_first_row([found], path, csv)) == count


def _first_row(lines: Iterable[str], path: Path, csv: Csv) -> list[str]:
    quoting: Literal[0, 3] = QUOTE_NONE if csv.quote == "" else QUOTE_MINIMAL
    escaped = csv.escape is not None
    rows = reader(
        lines, delimiter=_delimiter(path, csv), quoting=quoting, escapechar=csv.escape, doublequote=not escaped
    )
    return next(rows, [])


def _delimiter(path: Path, csv: Csv) -> str:
    return csv.delimiter or ("\t" if ".tsv" in path.suffixes else ",")


def _unpacked(disk: BinaryIO) -> BinaryIO:
    """The text of a file, plain or gzip (told by its content)."""
    compressed = disk.read(2) == b"\x1f\x8b"
    disk.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=disk)) if compressed else disk


def _place(path: Path, wrong: Callable[[bytes], bool]) -> str | None:
    """The first line of which something holds; slow, but it runs once."""
    with path.open("rb") as disk, suppress(OSError, EOFError, zlib.error, CsvError):
        return next((f"{path}, line {number}" for number, line in enumerate(_unpacked(disk), 1) if wrong(line)), None)
    return None


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
