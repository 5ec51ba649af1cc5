"""Rows that hold a target and the events before it: their columns, and how they are written.

Long histories make large rows, so row groups are bounded by list elements as well as by rows: whoever reads one row
group at a time never holds more than some hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embtab.datasets.schema import ROW_GROUP_ROWS, Categorical, Dataset, open_writer

Ids = NDArray[np.int64]

SPACES = {"item": "items", "category": "categories", "position": "positions"}
ELEMENTS = 4_000_000  # events of a row group: 32 MB per list column


def features_of(sizes: Mapping[str, int]) -> tuple[Categorical, ...]:
    """The columns of the target, then those of its history, from the number of ids of each (keys of SPACES)."""
    target = [Categorical(name, size, id_space=SPACES[name]) for name, size in sizes.items()]
    history = [
        Categorical(f"history_{name}", size, pooling="none", id_space=SPACES[name], multi=True)
        for name, size in sizes.items()
    ]
    return (*target, *history)


def before(stops: Ids, lengths: Ids) -> tuple[Ids, Ids]:
    """The events [stop - length, stop) of every row, one row after the other, and how far each lies back (1 = last)."""
    ages = np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))
    return np.repeat(stops, lengths) - ages, ages


def pieces(elements: Ids, rows: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts targets into ranges that each fit into a row group.

    Args:
        elements: int64 [T], list elements that the rows of each target hold together.
        rows: rows of each target.
    """
    ends = np.cumsum(elements)
    low = 0
    while low < len(elements):
        done = ends[low - 1] if low else 0
        high = int(np.searchsorted(ends, done + ELEMENTS, side="right"))
        high = max(low + 1, min(high, low + ROW_GROUP_ROWS // rows))
        yield low, high
        low = high


def table_of(dataset: Dataset, columns: Mapping[str, NDArray], lists: Mapping[str, NDArray], lengths: Ids) -> pa.Table:
    """The rows of plain columns [n] and list columns (values one row after the other, all of the same lengths [n])."""
    schema = dataset.arrow_schema()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    arrays = [
        pa.ListArray.from_arrays(offsets, pa.array(lists[name]), type=schema.field(name).type)
        if name in lists
        else pa.array(columns[name])
        for name in schema.names
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_tables(
    folder: Path, split: str, dataset: Dataset, tables: Iterable[pa.Table], counts: dict[str, Ids] | None = None
) -> None:
    """Writes `SPLIT/part-00000.parquet`, one row group per table, and adds each id's occurrences to `counts`."""
    with open_writer(folder / split / "part-00000.parquet", dataset.arrow_schema()) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
            for name, seen in (counts or {}).items():
                chunk = table[name].combine_chunks()
                ids = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
                seen += np.bincount(ids.to_numpy(), minlength=len(seen))
