"""What the kinds of raw data have in common: how they are made, prepared, and read again without the package.

`verify` of a kind reads the raw files anew in plain Python and compares every row with what was prepared. Files that it
cannot read are ones that must have been refused: it then raises a ValueError or anything but an AssertionError.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from numpy.random import Generator

Row = dict[str, Any]
ROWS = 40
SHARES = ("--valid", "0", "--test", "0")


@dataclass(frozen=True)
class Kind:
    """A kind of raw data: how good files are written, the command that prepares them, and what must come of them."""

    name: str
    write: Callable[[Path, Generator], None]
    command: tuple[str, ...]
    verify: Callable[[Path, Path], None]
    raw: str = ""
    """The file to give to the command; else the folder."""

    def arguments(self, folder: Path, out: Path) -> list[str]:
        roles = ["--roles", str(folder.parent / "roles.yaml")] if self.command[0] == "table" else []
        return ["prepare", *self.command, str(folder / self.raw), *roles, "--out", str(out)]


def prepared(out: Path, split: str = "train") -> list[Row]:
    """Rows of a prepared folder with values in the place of ids, None for id 0."""
    values = {}
    for file in (out / "vocab").iterdir():
        table = pq.read_table(file)
        if "value" in table.column_names:
            values[file.stem] = table["value"].to_pylist()
    rows = pq.read_table(out / split).to_pylist()
    for row in rows:
        for name, known in values.items():
            row[name] = [known[i] for i in row[name]] if isinstance(row[name], list) else known[row[name]]
    return rows


def text_of(file: Path, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode(encoding, errors)


def lines_of(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def lines_of_any_end(file: Path, encoding: str = "utf-8-sig") -> list[str]:
    return lines_of(text_of(file, encoding).replace("\r\n", "\n").replace("\r", "\n"))


def cells(line: str, separator: str | None, count: int) -> list[str]:
    found = line.split(separator)
    if len(found) != count:
        raise ValueError(f"{len(found)} cells, not {count}: {line!r}")
    return found


def equal(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted), f"{len(found)} rows, not {len(wanted)}"
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one == other, f"row {number}: {one} instead of {other}"
