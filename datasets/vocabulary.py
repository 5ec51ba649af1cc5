"""Raw values to contiguous ids, most frequent first.

A vocabulary is a table with one row per id: `value` (the raw value as a string) and `count` (training occurrences).
Id 0 stands for everything that has no row of its own: values too rare in the training split, and values that only
other splits hold. Its `value` is null and its `count` the training occurrences of the rare values together.
"""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema([pa.field("value", pa.string()), pa.field("count", pa.int64(), nullable=False)])


def exactly(name: str) -> str:
    """A column's name as polars selects that column alone: it takes `*` and names such as `^c.*$` for patterns."""
    return f"^{re.escape(name)}$" if name == "*" or (name.startswith("^") and name.endswith("$")) else name


def fit(values: pl.LazyFrame, min_count: int = 1) -> pl.DataFrame:
    """The vocabulary of one column of the training split.

    Args:
        values: one column of strings, or of lists of strings whose elements are counted one by one; no nulls.
        min_count: values that occur less often share id 0.

    Returns:
        Columns value (String) and count (Int64), row i for id i: descending count, equal counts in the order of the
        values' UTF-8 bytes, so the same data always gives the same ids.
    """
    (name,) = values.collect_schema().names()
    column = values.select(value=exactly(name))
    if column.collect_schema()["value"] == pl.List(pl.String):
        column = column.explode("value").drop_nulls()  # polars 1 makes a null of an empty list
    counted = column.group_by("value").agg(pl.len().cast(pl.Int64).alias("count")).collect(engine="streaming")
    kept = counted.filter(pl.col("count") >= min_count).sort(["count", "value"], descending=[True, False])
    rare = counted["count"].sum() - kept["count"].sum()
    return pl.concat([pl.DataFrame({"value": [None], "count": [rare]}, schema=kept.schema), kept])


def encode(rows: pl.LazyFrame, vocabularies: dict[str, pl.DataFrame]) -> pl.LazyFrame:
    """Replaces raw values by their ids (Int64), in place and in the order of the rows; unknown values become 0.

    Args:
        rows: any columns; those named in `vocabularies` hold strings or lists of strings.
        vocabularies: the vocabulary (see `fit`) of each column to encode.
    """
    schema = rows.collect_schema()
    ids = {}
    for name, vocabulary in vocabularies.items():
        # An Enum builds its hash table once for a whole stream; `replace` would build it for every batch.
        known = pl.Enum(vocabulary["value"].slice(1))
        value = pl.element() if schema[name] == pl.List(pl.String) else pl.col(exactly(name))
        position = value.cast(known, strict=False).to_physical().cast(pl.Int64)
        ids[name] = (position + 1).fill_null(0)
        if schema[name] == pl.List(pl.String):
            ids[name] = pl.col(exactly(name)).list.eval(ids[name])
    return rows.with_columns(**ids)


def save(vocabularies: dict[str, pl.DataFrame], folder: Path) -> None:
    """Writes `vocab/NAME.parquet` below `folder` for every vocabulary."""
    (folder / "vocab").mkdir()
    for name, vocabulary in vocabularies.items():
        pq.write_table(vocabulary.to_arrow().cast(_SCHEMA), folder / "vocab" / f"{name}.parquet", compression="lz4")
