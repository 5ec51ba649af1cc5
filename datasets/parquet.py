"""Row groups of a prepared dataset: found, compared with `dataset.json`, and read, with errors that say where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embtab.datasets.schema import SPLITS, Dataset, PartFile
from embtab.errors import DataError, UserError


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file, the unit that is read at a time; `metadata` is the file's footer."""

    path: Path
    index: int
    rows: int
    metadata: pq.FileMetaData

    def __str__(self) -> str:
        return f"{self.path}, row group {self.index}"


def row_groups(folder: Path, dataset: Dataset, split: str) -> list[RowGroup]:
    """The row groups of a split in reading order; groups without rows are left out.

    Raises:
        UserError: for a split that does not exist.
        DataError: when the split is empty, or a file is absent, unreadable or other than `dataset.json` says.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
    if dataset.rows(split) == 0:
        raise DataError(f"{folder}: the {split} split is empty; prepare the data with rows for it")
    return [group for part in dataset.parts(split) for group in _groups_of(folder, dataset, part) if group.rows]


def _groups_of(folder: Path, dataset: Dataset, part: PartFile) -> Iterator[RowGroup]:
    path = folder / part.path
    metadata = read_footer(path)
    for _, difference in column_differences(metadata.schema.to_arrow_schema(), dataset.arrow_schema()):
        raise DataError(f"{path}: {difference}")
    if metadata.num_rows != part.rows:
        raise DataError(f"{path}: has {metadata.num_rows} rows but dataset.json says {part.rows}; prepare it again")
    for index in range(metadata.num_row_groups):
        yield RowGroup(path, index, metadata.row_group(index).num_rows, metadata)


def read_footer(path: Path) -> pq.FileMetaData:
    """The footer of a Parquet file.

    Raises:
        DataError: when the file is absent, truncated or not Parquet.
    """
    if not path.exists():
        raise DataError(f"{path}: is listed in dataset.json but does not exist; prepare the data again")
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated or not a Parquet file ({_first_line(error)})") from error


def column_differences(found: pa.Schema, wanted: pa.Schema) -> list[tuple[str, str]]:
    """What separates a file's columns from the described ones, as (column, sentence); order does not matter."""
    differences = []
    for field in wanted:
        if found.names.count(field.name) > 1:
            differences.append((field.name, f"column {field.name!r} stands twice"))
        elif field.name not in found.names:
            differences.append((field.name, f"column {field.name!r} is missing"))
        elif not _same_type(found.field(field.name).type, field.type):
            kind = found.field(field.name).type
            differences.append((field.name, f"column {field.name!r} is {kind} but must be {field.type}"))
    extra = [name for name in found.names if name not in wanted.names]
    return differences + [(name, f"column {name!r} is not in dataset.json") for name in extra]


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equality that overlooks the name and nullability of list elements, which writers choose differently."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)


def read_columns(group: RowGroup, columns: list[str]) -> pa.Table:
    """The columns of one row group, null-free, in the given order.

    Raises:
        DataError: when the row group cannot be decoded or holds a null, naming the column.
    """
    try:
        table = _read(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{group}, column {_unreadable(group, columns)}: {_first_line(error)}") from error
    for name in columns:
        row = first_null(table[name])
        if row is not None:
            raise DataError(f"{group}, column {name!r}, row {row}: holds a null; fill it when preparing the data")
    return table


def _read(group: RowGroup, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(group.path, metadata=group.metadata) as file:
        table = file.read_row_group(group.index, columns=columns).select(columns)
    table.validate()  # that all columns are of one length
    if len(table) != group.rows:
        raise pa.ArrowInvalid(f"holds {len(table)} rows but the footer says {group.rows}")
    return table


def _unreadable(group: RowGroup, columns: list[str]) -> str:
    for name in columns:
        try:
            _read(group, [name])
        except (pa.ArrowException, OSError):
            return repr(name)
    return "unknown"


def first_null(column: pa.ChunkedArray) -> int | None:
    """The first row of a column that is null, or whose list holds a null."""
    start = 0
    for chunk in column.chunks:
        if chunk.null_count:
            return start + int(chunk.is_null().to_numpy(zero_copy_only=False).argmax())
        if pa.types.is_list(chunk.type) and chunk.flatten().null_count:
            position = int(chunk.flatten().is_null().to_numpy(zero_copy_only=False).argmax())
            ends = chunk.offsets.to_numpy()[1:] - chunk.offsets[0].as_py()
            return start + int(ends.searchsorted(position, side="right"))
        start += len(chunk)
    return None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
