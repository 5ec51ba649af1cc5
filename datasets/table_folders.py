"""What the folders of a table say: columns in their names, and whether its files hold rows that were deleted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from embtab.errors import DataError

Value = str | int | None
_NULL = "__HIVE_DEFAULT_PARTITION__"
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_KINDS = (("_delta_log", "*", "Delta Lake"), ("metadata", "*.metadata.json", "Iceberg"), (".hoodie", "*", "Hudi"))


def partitions(files: Sequence[Path]) -> list[dict[str, Value]]:
    """The columns in the names of folders, `KEY=VALUE` with % before what such a name cannot hold, as Hive and Spark
    write them: whole numbers where all values of a key are, else text.

    Args:
        files: paths as they were given or found.
    """
    found = [dict(_pairs(file)) for file in files]
    values: dict[str, list[str]] = {}
    for own in found:
        for key, value in own.items():
            if value is not None:
                values.setdefault(key, []).append(value)
    whole = {key for key, given in values.items() if all(map(_WHOLE.fullmatch, given))}
    return [{key: int(v) if v is not None and key in whole else v for key, v in own.items()} for own in found]


def _pairs(file: Path) -> list[tuple[str, str | None]]:
    steps = [step.partition("=") for step in file.parts[:-1] if not step.startswith("=") and "=" in step]
    return [(unquote(key), None if value == _NULL else unquote(value)) for key, _, value in steps]


def with_constants(rows: pl.DataFrame, constants: Mapping[str, Value]) -> pl.DataFrame:
    """The rows with further columns, each of one value."""
    columns = {name: rows[name] for name in rows.columns}
    for name, value in constants.items():
        kind = pl.Int64() if isinstance(value, int) else pl.String()
        columns[name] = pl.repeat(value, rows.height, dtype=kind, eager=True)
    return pl.DataFrame(columns)


def refuse_versioned(files: Sequence[Path]) -> None:
    """Refuses files of a table whose log says which of their rows are deleted.

    Raises:
        DataError: naming the table.
    """
    folders = {folder for file in files for folder in file.resolve().parents}
    for folder in sorted(folders):
        for log, pattern, kind in _KINDS:
            if (folder / log).is_dir() and any((folder / log).glob(pattern)):
                raise DataError(
                    f"{folder}: is a {kind} table, whose files also hold rows that were deleted or replaced; write its "
                    "present rows as plain Parquet, such as spark.table(...).write.parquet(...), and give those"
                )
