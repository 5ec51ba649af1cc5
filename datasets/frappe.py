"""Frappe, a log of app usage in context (Baltrunas et al., arXiv 1505.03014), as the libsvm files of the field.

Each line is a label (1, or 0 or -1) and ten one-hot fields `INDEX:1`, always in the order of FIELDS; indices count
through all fields, so the fields' ranges must not meet. Two sampled negatives follow each positive in the original.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtab.datasets import vocabulary
from embtab.datasets.schema import SPLITS, Categorical, Dataset, describe_files
from embtab.datasets.splits import write_split
from embtab.errors import DataError, shown
from embtab.files import new_folder

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
USER = "user_id"  # the raw index: in the feature `user`, all users that train does not hold are one

_LABELS = {"1": 1, "0": 0, "-1": 0}
_HELD_OUT = 0.1
_SEED = 0


def prepare(raw: Path, out: Path) -> Dataset:
    """Turns a folder of libsvm files into a dataset folder.

    `valid.libsvm` and `test.libsvm` become the splits of these names and `train.libsvm` the training split. Where the
    latter is absent, `valid.libsvm` takes its place, and a random tenth of its rows (fixed seed) is held out as
    `valid`. Ids are contiguous within a field, by descending count in train; id 0 stands for indices that train does
    not hold. The column `user_id` is the raw index of the user, for metrics grouped by user.

    Args:
        raw: the folder.
        out: the folder to make; it must not exist, or be empty.

    Raises:
        UserError: for an output folder that is not empty.
        DataError: for a missing or bad file, naming file, line and field. No output is left behind.
    """
    files = {split: raw / f"{split}.libsvm" for split in SPLITS}
    for split in ("valid", "test"):
        if not files[split].exists():
            raise DataError(f"{files[split]}: no such file; a Frappe folder holds valid.libsvm and test.libsvm")
    with new_folder(out) as folder:
        tables = {split: _read(file) for split, file in files.items() if file.exists()}
        _check_fields(raw, tables)
        source: dict[str, Any] = {"kind": "frappe", "files": [files[split].name for split in tables]}
        if "train" not in tables:
            tables |= _hold_out(tables["valid"])
            source |= {"held_out_of_valid.libsvm": _HELD_OUT, "seed": _SEED}
        texts = {
            split: table.lazy().with_columns(pl.col(FIELDS).cast(pl.String), pl.col("user").alias(USER))
            for split, table in tables.items()
        }
        vocabularies = {name: vocabulary.fit(texts["train"].select(name)) for name in FIELDS}
        vocabulary.save(vocabularies, folder)
        features = tuple(Categorical(name, len(vocabularies[name])) for name in FIELDS)
        dataset = Dataset(name="frappe", features=features, user=USER, source=source)
        for split in SPLITS:
            write_split(folder, split, dataset, [vocabulary.encode(texts[split], vocabularies).collect()])
        dataset = replace(dataset, files=describe_files(folder))
        dataset.save(folder)
    return dataset


def _hold_out(table: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Train and valid out of one table; both keep its order."""
    held = np.zeros(len(table), dtype=bool)
    held[np.random.default_rng(_SEED).permutation(len(table))[: round(len(table) * _HELD_OUT)]] = True
    return {"train": table.filter(~held), "valid": table.filter(held)}


def _read(file: Path) -> pl.DataFrame:
    """Columns label (float32) and FIELDS (int64 indices)."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not text (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if not lines:
        raise DataError(f"{file}: is empty; fetch it again")
    rows = [_row(line, f"{file}: line {number}") for number, line in enumerate(lines, 1)]
    return pl.DataFrame(rows, schema={"label": pl.Float32} | dict.fromkeys(FIELDS, pl.Int64), orient="row")


def _row(line: str, where: str) -> list[int]:
    label, *fields = line.split() or [""]
    if label not in _LABELS:
        raise DataError(f"{where}: the label must be 0, 1 or -1, got {shown(label)}")
    if len(fields) != len(FIELDS):
        raise DataError(f"{where}: has {len(fields)} fields, not {len(FIELDS)} ({', '.join(FIELDS)})")
    row = [_LABELS[label]]
    for name, text in zip(FIELDS, fields, strict=True):
        index, colon, value = text.partition(":")
        if not colon or value != "1" or not re.fullmatch(r"[0-9]{1,18}", index):
            raise DataError(f"{where}: field {name}: must be INDEX:1, got {shown(text)}")
        row.append(int(index))
    return row


def _check_fields(raw: Path, tables: dict[str, pl.DataFrame]) -> None:
    """An index in the range of two fields means that some line lists its fields in another order."""
    spans = []
    for name in FIELDS:
        column = pl.concat([table[name] for table in tables.values()])
        spans.append((column.min(), column.max(), name))
    spans.sort()
    for (_, last, name), (first, _, other) in pairwise(spans):
        if first <= last:
            raise DataError(
                f"{raw}: indices {first} to {last} occur in the fields {name} and {other}; "
                "every line must list the fields in the same order"
            )
