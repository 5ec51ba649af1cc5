"""results.csv: a row for every cell of a sweep, read and written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embtab.compare.summary import Row
from embtab.errors import UserError
from embtab.files import replaced_file, write_text

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
    rows = read_rows(file, COLUMNS, _TEXTS, without_costs)
    return {place(row): row for row in rows}


def write_results(file: Path, rows: Sequence[Row]) -> None:
    """Replaces the file in one step."""
    write_rows(file, COLUMNS, rows)


def read_rows(file: Path, columns: Sequence[str], texts: Sequence[str], earlier: Sequence[str] = ()) -> list[Row]:
    """The rows that `write_rows` wrote; none where there is no file.

    Args:
        file: a CSV file.
        columns: it must have exactly these.
        texts: those that hold text; the others hold JSON. An empty cell is None.
        earlier: the columns that it may have instead; the others are then None.

    Raises:
        UserError: when it has other columns.
    """
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        if list(reader.fieldnames or ()) not in (list(columns), list(earlier)):
            raise UserError(f"{file}: not a results.csv of this comparison in this version; choose another --out")
        return [{name: _parsed(row.get(name, ""), name in texts) for name in columns} for row in reader]


def write_rows(file: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces the file in one step; numbers with all digits, what is nested as JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({name: _printed(row[name]) for name in columns} for row in rows)
    write_text(file, text.getvalue())


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    """The same with types; what is nested differently from row to row is JSON."""
    columns = {}
    for name in COLUMNS:
        values = [row[name] for row in rows]
        if name in _NESTED:
            values = [None if value is None else _printed(value) for value in values]
        columns[name] = pa.array(values, _arrow_type(name))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_bytes(file, sink.getvalue().to_pybytes())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step; a crash leaves the old file or the new one."""
    with replaced_file(path) as beside:
        beside.write_bytes(content)


def _arrow_type(name: str) -> pa.DataType:
    if name == "auc_resampled":
        return pa.list_(pa.float64())
    if name in _TEXTS or name in _NESTED:
        return pa.string()
    return pa.int64() if name in _WHOLE else pa.float64()


def _printed(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _parsed(cell: str, is_text: bool) -> Any:
    if cell == "":
        return None
    return cell if is_text else json.loads(cell)
