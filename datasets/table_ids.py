"""The ids of a table's columns: which values have one, how often each occurs, how many raw ids there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embtab.datasets import vocabulary
from embtab.datasets.roles import DERIVED, Ids, Roles
from embtab.errors import DataError

_MOST_RAW_IDS = 2**28  # their counts are held: 2 GB


def count_values(train: pl.LazyFrame, features: Iterable[Ids]) -> dict[str, pl.DataFrame]:
    """The vocabulary (see `vocabulary`) of every column whose values are not ids as they stand.

    Columns of one id space have the same values, in the order of their counts in all of them, each with its own counts.
    """
    counted: dict[str, dict[str, pl.DataFrame]] = {}
    min_counts = {}
    for feature in features:
        if not feature.is_id:
            found = vocabulary.fit(train.select(vocabulary.exactly(feature.column))).slice(1)
            counted.setdefault(feature.space, {})[feature.column] = found
            min_counts[feature.space] = feature.min_count
    named: dict[str, pl.DataFrame] = {}
    for space, columns in counted.items():
        named |= _shared(columns, min_counts[space])
    return named


def _shared(columns: Mapping[str, pl.DataFrame], min_count: int) -> dict[str, pl.DataFrame]:
    together = pl.concat(columns.values()).group_by("value").sum().filter(pl.col("count") >= min_count)
    kept = together.sort(["count", "value"], descending=[True, False]).select("value")
    vocabularies = {}
    for name, counted in columns.items():
        own = kept.join(counted, on="value", how="left", maintain_order="left").with_columns(
            pl.col("count").fill_null(0)
        )
        rare = counted["count"].sum() - own["count"].sum()
        vocabularies[name] = pl.concat([pl.DataFrame({"value": [None], "count": [rare]}, schema=own.schema), own])
    return vocabularies


def raw_num_ids(rows: pl.LazyFrame, roles: Roles) -> dict[str, int]:
    """The cardinality of every raw column, and of those made of the time.

    Raises:
        DataError: when ids are so large that no table could have a row for each.
    """
    spaces: dict[str, list[Ids]] = {}
    for feature in roles.features:
        if feature.raw:
            spaces.setdefault(feature.space, []).append(feature)
    num_ids = {name: DERIVED[part] for name, part in roles.derived.items()}
    for members in spaces.values():
        declared = members[0].num_ids
        size = declared if declared is not None else 1 + max(_largest(rows, member) for member in members)
        if size > _MOST_RAW_IDS:
            name = members[0].column
            raise DataError(f"column {name!r}: raw ids up to {size - 1} are too large; leave raw out to number them")
        num_ids |= {member.column: size for member in members}
    return num_ids


def _largest(rows: pl.LazyFrame, feature: Ids) -> int:
    column = pl.col(vocabulary.exactly(feature.column))
    largest = rows.select((column.list.max() if feature.is_list else column).max()).collect(engine="streaming").item()
    return 0 if largest is None else int(largest)


def save_raw_counts(column: pl.LazyFrame, num_ids: int, folder: Path) -> None:
    """Writes `vocab/NAME.parquet` below `folder`: how often each of the ids of one column occurs."""
    schema = column.collect_schema()
    (name,) = schema
    column = column.select(value=vocabulary.exactly(name))
    if isinstance(schema[name], pl.List):
        column = column.explode("value").drop_nulls()
    found = column.group_by("value").agg(pl.len().alias("count")).collect(engine="streaming")
    counts = np.zeros(num_ids, np.int64)
    counts[found[:, 0].to_numpy()] = found[:, 1].to_numpy()
    fields = pa.schema([pa.field("count", pa.int64(), nullable=False)])
    pq.write_table(pa.table([counts], schema=fields), folder / "vocab" / f"{name}.parquet", compression="lz4")
