"""Row groups of Parquet in pieces of bounded bytes: a kilobyte of a file may say a thousand times the same megabyte."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROWS = 65_536
BYTES = 64 << 20
"""Of the values of a piece, unless a single row has more."""


def pieces(path: Path, group: int, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The wanted columns of a row group, at most ROWS rows and some BYTES at a time.

    Text with long values is read as it is stored, each value once, and written out piece by piece.

    Raises:
        ArrowException, OSError: when the row group cannot be decoded.
    """
    with pq.ParquetFile(path) as file:
        described, schema = file.metadata.row_group(group), file.schema_arrow
    leaves = {each.path_in_schema: each for each in map(described.column, range(described.num_columns))}
    own = {leaf: name for leaf in leaves if (name := _column(leaf, wanted)) is not None}
    stored = sum(leaves[leaf].total_uncompressed_size for leaf in own) / max(described.num_rows, 1)
    rows = int(min(max(BYTES / max(stored, 1), 1), ROWS))
    text = {
        leaf: name for leaf, name in own.items() if _leaf(schema.field(name).type) in (pa.string(), pa.large_string())
    }
    long = {
        leaf
        for leaf, size in _longest(path, group, text).items()
        if size * leaves[leaf].num_values * rows * len(text) > BYTES * described.num_rows
    }
    names = {text[leaf] for leaf in long}
    with pq.ParquetFile(path, read_dictionary=long) as file:
        for batch in file.iter_batches(rows, row_groups=[group], columns=list(wanted)):
            batch.validate(full=True)  # text that is not UTF-8 would pass unseen
            for part in _bounded(batch.select(wanted), names) if names else [batch.select(wanted)]:
                yield pl.DataFrame(pl.from_arrow(in_utc(part)))


def _longest(path: Path, group: int, text: Mapping[str, str]) -> dict[str, float]:
    """The bytes of the longest value that is stored once for many rows, by leaf; infinite where the first row, with
    which they are read, has none.
    """
    if not text:
        return {}
    with pq.ParquetFile(path, read_dictionary=list(text)) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=list(text.values())), None)
    if first is None:
        return {}
    found = {}
    for leaf, name in text.items():
        values = first[name] if pa.types.is_dictionary(first[name].type) else first[name].values
        longest = pc.max(pc.binary_length(values.dictionary)).as_py()
        found[leaf] = math.inf if longest is None else longest
    return found


def _leaf(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _column(path: str, names: Sequence[str]) -> str | None:
    """The column that a leaf belongs to: names may have dots themselves."""
    return next((name for name in names if path == name or path.startswith(f"{name}.")), None)


def _bounded(batch: pa.RecordBatch, text: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Parts of a batch that hold no more than BYTES of text, or a single row, written out."""
    ends = np.cumsum(sum((_bytes(batch[name]) for name in text), np.zeros(len(batch), np.int64)))
    begin = 0
    while begin < len(batch):
        before = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, before + BYTES, side="right")), begin + 1)
        part = batch.slice(begin, end - begin)
        yield pa.RecordBatch.from_arrays(
            [_written_out(part[name]) if name in text else part[name] for name in part.schema.names],
            names=part.schema.names,
        )
        begin = end


def _bytes(column: pa.Array) -> NDArray[np.int64]:
    """Of each row's text."""
    if not pa.types.is_dictionary(column.type):
        lengths = _bytes(column.flatten())
        counts = np.diff(column.offsets.to_numpy())  # of null lists, none
        ends = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], np.cumsum(counts)])]
        return np.diff(ends)
    sizes = pc.fill_null(pc.binary_length(column.dictionary), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not len(sizes):
        return np.zeros(len(column), np.int64)
    return np.where(column.is_valid(), sizes[pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)], 0)


def _written_out(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    counts = pa.array(np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(column), 0))]), pa.int64())
    values = column.flatten().dictionary_decode()
    return pa.LargeListArray.from_arrays(counts, values, mask=column.is_null())


def in_utc(rows: pa.RecordBatch | pa.Table) -> pa.RecordBatch | pa.Table:
    """The same moments, whatever time zone they are shown in: polars knows no "+05:30", and they are stored in UTC."""
    fields = [
        each.with_type(pa.timestamp(each.type.unit, "UTC"))
        if pa.types.is_timestamp(each.type) and each.type.tz
        else each
        for each in rows.schema
    ]
    return rows.cast(pa.schema(fields))
