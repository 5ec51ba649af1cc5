"""The train, valid and test parts of a dataset: how many rows each has, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from embtab.datasets.schema import ROW_GROUP_ROWS, SPLITS, Dataset, open_writer
from embtab.datasets.vocabulary import exactly
from embtab.errors import DataError, UserError


def check_fractions(valid: float, test: float) -> None:
    """Refuses fractions that leave nothing to train on.

    Raises:
        UserError: unless both lie in [0, 1) and their sum is below 1.
    """
    for name, fraction in (("valid", valid), ("test", test)):
        if not 0 <= fraction < 1:
            raise UserError(f"{name} must be a fraction in [0, 1), got {fraction}")
    if valid + test >= 1:
        raise UserError(f"valid {valid} and test {test} leave no rows for training; their sum must be below 1")


def split_sizes(rows: int, valid: float, test: float) -> dict[str, int]:
    """Rows of each split, in the order train, valid, test: the fractions rounded, the rest for training.

    A split without rows is left out: the dataset does not have it.

    Raises:
        DataError: when no row is left for training.
    """
    num_valid, num_test = round(rows * valid), round(rows * test)
    num_train = rows - num_valid - num_test
    if num_train < 1:
        raise DataError(f"{rows} rows are too few: valid {valid} and test {test} leave none for training")
    sizes = zip(SPLITS, (num_train, num_valid, num_test), strict=True)
    return {split: size for split, size in sizes if size}


def write_split(folder: Path, split: str, dataset: Dataset, batches: Iterable[pl.DataFrame]) -> None:
    """Writes one split as `SPLIT/part-00000.parquet`, in row groups of exactly ROW_GROUP_ROWS rows but the last.

    Args:
        folder: the dataset folder.
        split: train, valid or test.
        dataset: describes the columns.
        batches: the rows in order, cut anywhere: the file's bytes do not depend on the cuts.
    """
    schema = dataset.arrow_schema()
    held: list[pl.DataFrame] = []
    with open_writer(folder / split / "part-00000.parquet", schema) as writer:
        for batch in batches:
            held.append(batch.select(map(exactly, schema.names)))
            if sum(part.height for part in held) < ROW_GROUP_ROWS:
                continue
            rows = pl.concat(held)
            whole = rows.height // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            writer.write_table(rows[:whole].to_arrow().cast(schema), row_group_size=ROW_GROUP_ROWS)
            held = [rows[whole:]]
        if sum(part.height for part in held):
            writer.write_table(pl.concat(held).to_arrow().cast(schema))
