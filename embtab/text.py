"""Names and messages of others within text that something else reads: terminals, Markdown, spreadsheets.

A feature is called what a column is called, and a column may be called anything.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What a terminal or a page obeys or reorders by, and halves of characters, which cannot be printed at all.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = re.compile(r"[\\`*\[\]|~&<>]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[#+=-]+(?=\s|$)|(?<=^\d)[.)](?=\s)")


def printable(text: str) -> str:
    """The text on one line, with control characters escaped as `repr` does, so that no terminal obeys them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(value: Any) -> str:
    """A value as text that Markdown shows as it is: no element, link, emphasis, cell or heading comes of it."""
    return _MARKS.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), printable(str(value)))


def markdown_row(cells: Iterable[Any]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(markdown, cells))} |"


def fenced(text: str, language: str = "text") -> list[str]:
    """Lines of a code block in Markdown, which no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], line_end: str = "\r\n") -> str:
    """A CSV file with a header; None and what a row lacks are empty cells. See `cell`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerow(map(cell, columns))
    writer.writerows([cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def cell(value: Any) -> str:
    """A value as a cell of a CSV file. Text that a spreadsheet would compute begins with an apostrophe instead, and so
    does text that begins with one already: `from_cell` takes it off again.
    """
    text = "" if value is None else str(value)
    computed = text.startswith((*_FORMULA, "'")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if computed else text


def from_cell(text: str) -> str:
    """The text that `cell` was given."""
    return text.removeprefix("'")
