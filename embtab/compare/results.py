"""results.csv: a row for every cell of a sweep, read and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embtab.compare.rows import printed, read_rows, write_rows
from embtab.compare.summary import Row
from embtab.files import write_bytes

METRICS = ("auc", "logloss", "ne", "calibration", "gauc", "hr@10", "ndcg@10", "val_auc", "epochs")
"""On the test split, but for val_auc."""
TIMES = ("samples_per_s", "latency_us", "seconds", "search_seconds")
COSTS = ("search_seconds", "trained_samples", "training_nbytes")
"""What making the tables took, beside `seconds` of it all; nothing of it is needed to serve them."""
DETAILS = ("slices", "deciles", "collisions", "auc_resampled")
"""See `embtab.compare.measure`."""
COLUMNS = (
    *("key", "status", "method", "budget", "precision", "seed", "budget_bytes", "nbytes", "dense_nbytes", "min_bytes"),
    *METRICS,
    *TIMES[:-1],
    *COSTS,
    *("bytes_by_part", "training", "dim", "dataset", "fingerprint", "versions", "error"),
    *DETAILS,
)
_TEXTS = ("key", "status", "method", "budget", "precision", "dataset", "fingerprint", "error")
_WHOLE = (
    "seed",
    "budget_bytes",
    "nbytes",
    "dense_nbytes",
    "min_bytes",
    "dim",
    "epochs",
    "trained_samples",
    "training_nbytes",
)
_NESTED = ("bytes_by_part", "training", "versions", "slices", "deciles", "collisions")


def place(row: Row) -> str:
    """What a row is about; a new result replaces an old one of the same place."""
    settings = json.dumps(row["training"], sort_keys=True)
    parts = [row[name] for name in ("fingerprint", "method", "budget", "precision", "seed", "dim")]
    return "|".join(map(str, [*parts, settings]))


def read_results(file: Path) -> dict[str, Row]:
    """The rows of an earlier run, by place.

    Raises:
        UserError: when the file is not a results.csv of this version.
    """
    without_costs = tuple(name for name in COLUMNS if name not in COSTS)  # of sweeps before these were counted
    return read_rows(file, COLUMNS, _TEXTS, place, without_costs)


def write_results(file: Path, rows: Sequence[Row]) -> None:
    """Replaces the file in one step."""
    write_rows(file, COLUMNS, rows)


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    """The same with types; what is nested differently from row to row is JSON."""
    columns = {}
    for name in COLUMNS:
        values = [row[name] for row in rows]
        if name in _NESTED:
            values = [None if value is None else printed(value) for value in values]
        columns[name] = pa.array(values, _arrow_type(name))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_bytes(file, sink.getvalue().to_pybytes())


def _arrow_type(name: str) -> pa.DataType:
    if name == "auc_resampled":
        return pa.list_(pa.float64())
    if name in _TEXTS or name in _NESTED:
        return pa.string()
    return pa.int64() if name in _WHOLE else pa.float64()
