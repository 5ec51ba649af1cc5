"""Rows of results in a CSV file: read by what each is about, and replaced in one step."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embtab.compare.summary import Row
from embtab.errors import UserError
from embtab.files import write_text
from embtab.text import csv_text, from_cell


def read_rows(
    file: Path,
    columns: Sequence[str],
    texts: Sequence[str],
    key: Callable[[Row], str],
    earlier: Sequence[str] = (),
) -> dict[str, Row]:
    """The rows that `write_rows` wrote, by their keys; none where there is no file.

    Args:
        file: a CSV file.
        columns: it must have exactly these.
        texts: those that hold text; the others hold JSON. An empty cell is None.
        key: of a row; of rows with the same one the last counts.
        earlier: the columns that it may have instead; the others are then None.

    Raises:
        UserError: when it has other columns.
    """
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        if list(reader.fieldnames or ()) not in (list(columns), list(earlier)):
            raise UserError(f"{file}: not a results.csv of this comparison in this version; choose another --out")
        rows = [{name: _parsed(from_cell(row.get(name) or ""), name in texts) for name in columns} for row in reader]
    return {key(row): row for row in rows}


def write_rows(file: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces the file in one step; numbers with all digits, what is nested as JSON."""
    write_text(file, csv_text(columns, [{name: printed(row[name]) for name in columns} for row in rows]))


def printed(value: Any) -> str:
    """A value as a cell: text as it is, all else as JSON; nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _parsed(cell: str, is_text: bool) -> Any:
    if cell == "":
        return None
    return cell if is_text else json.loads(cell)
