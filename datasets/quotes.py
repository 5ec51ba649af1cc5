"""Text on its way to the parser, looked at for quotes that would swallow lines.

A quote at the beginning of a value lasts until the next one, over delimiters and line breaks. Where it was text, as in
`"Hello` in a file that does not quote, rows vanish without an error: a parser cannot tell. Well-formed quotes are told
by NumPy, block by block; only a block with others, or with line breaks within quotes, is looked at value by value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from embtab.datasets.roles import Csv
from embtab.errors import DataError, shown

LONGEST = 8 << 20
"""Bytes of a row."""
_QUOTE = ord('"')
_PLAIN = """say csv: {quote: ''} in the roles if quotes are part of the text"""


class RowBlocks:
    """The text of a file in blocks of whole rows, whose quotes are checked; iterate over it once.

    Args:
        source: of UTF-8 text.
        path: for messages.
        delimiter: one byte.
        csv: its `quote` None is the quote of CSV, with a look at whether it was meant.
        columns: of a row.
        size: bytes to read at a time.

    Raises:
        DataError: naming the line.
    """

    def __init__(
        self, source: BinaryIO, path: Path, delimiter: str, csv: Csv, columns: int, size: int = LONGEST
    ) -> None:
        self._source, self._path, self._columns, self._size = source, path, columns, size
        self._delimiter, self._escape = delimiter.encode(), (csv.escape or "").encode()
        self._quotes, self._meant = csv.quote != "", csv.quote is not None
        self._held, self._line = b"", 1
        self._values = _values(self._delimiter, self._escape) if self._quotes else re.compile(rb"(?!)")

    def __iter__(self) -> Iterator[bytes]:
        """Each block ends with a row, and so with a line break but for the last."""
        text = self._source.read(self._size).removeprefix(b"\xef\xbb\xbf")
        while text:
            following = self._source.read(self._size)
            if block := self._whole_rows(text, final=not following):
                yield block
            text = following

    def _whole_rows(self, text: bytes, final: bool) -> bytes:
        self._held += text
        end = self._safe_end(self._held)
        whole = self._taken(end or 0)
        if end is None or final:
            whole += self._taken(self._checked_by_value(self._held, final))
        if len(self._held) > LONGEST:
            raise self._wrong(0, "a row does not end within 8 MB")
        return whole

    def _taken(self, end: int) -> bytes:
        """The text up to an end of a row; what is held, and its line, go on from there."""
        rows, self._held = self._held[:end], self._held[end:]
        self._line += _breaks(rows)
        return rows

    def _safe_end(self, text: bytes) -> int | None:
        """The end of the last row of text whose quotes are well-formed and hold no line breaks; None of other text."""
        if not self._quotes or b'"' not in text:
            return _after_break(text, 0, len(text) - 1)  # a last \r may be half of one
        if self._escape and self._escape in text:
            return None
        signs = np.frombuffer(text, np.uint8)
        quotes = np.flatnonzero(signs == _QUOTE)
        breaks = np.flatnonzero((signs[:-1] == 10) | (signs[:-1] == 13))
        if not self._well_formed(signs, quotes) or (np.searchsorted(quotes, breaks) & 1).any():
            return None
        return int(breaks[-1]) + 1 if len(breaks) else 0

    def _well_formed(self, signs: NDArray[np.uint8], quotes: NDArray[np.int64]) -> bool:
        """Whether every other quote begins a value and the ones between end one; doubled ones do both."""
        beside = np.zeros(256, bool)
        beside[[10, 13, _QUOTE, self._delimiter[0]]] = True
        opening, closing = quotes[::2], quotes[1::2]
        begins = beside[signs[opening - 1]] | (opening == 0)
        ends = beside[signs[np.minimum(closing + 1, len(signs) - 1)]]
        return bool(begins.all() and ends.all())

    def _checked_by_value(self, text: bytes, final: bool) -> int:
        """Looks at every quoted value; the end of the last complete row."""
        safe = seen = 0
        for value in self._values.finditer(text):
            safe = _after_break(text, seen, value.start(), safe)
            seen = value.end()
            if not value[2] or seen == len(text):  # it may go on
                if final and not value[2]:
                    raise self._wrong(value.start(), "a quoted value does not end")
                return len(text) if final else safe
            if text[seen : seen + 1] not in (self._delimiter, b"\n", b"\r"):
                raise self._wrong(value.start(), "a quoted value goes on after its end")
            if not self._meant and _breaks(value[1]):
                line_end = re.compile(rb"[\r\n]|\Z").search(text, seen)
                assert line_end is not None
                if line_end.start() == len(text) and not final:
                    return safe
                self._refuse_rows(text[safe : line_end.start()], value.start())
        return len(text) if final else _after_break(text, seen, len(text) - 1, safe)

    def _refuse_rows(self, lines: bytes, start: int) -> None:
        """Refuses a value over lines that would be rows without it, and in tab-separated text any over lines."""
        counts = {line.count(self._delimiter) + 1 for line in re.split(rb"\r\n|\r|\n", lines)}
        if counts == {self._columns} or self._delimiter == b"\t":
            number = _breaks(lines) + 1
            raise self._wrong(start, f"a quote holds {number} lines together, which may be rows of their own", "'\"'")

    def _wrong(self, start: int, what: str, meant: str = "") -> DataError:
        begin = _after_break(self._held, 0, start)
        line = self._line + _breaks(self._held[:begin])
        text = shown(self._held[begin : begin + 200].decode(errors="replace").splitlines()[0])
        if meant:
            fix = f"{_PLAIN}, and {{quote: {meant}}} if the value is meant so"
        else:
            fix = rf"{_PLAIN}, and {{escape: '\'}} if backslashes stand before quotes, as Spark writes them"
        return DataError(f"{self._path}, line {line}: {what}: {text}; {fix}")


def _values(delimiter: bytes, escape: bytes) -> re.Pattern[bytes]:
    """Quoted values, and whether they end: a quote begins one behind a delimiter or line break only."""
    edge, escaped = re.escape(delimiter), re.escape(escape)
    inner = rb'[^"' + escaped + rb"]++" + (rb"|" + escaped + rb"(?s:.)" if escape else rb'|""')
    return re.compile(rb"(?:\A|(?<=[\r\n" + edge + rb']))"((?:' + inner + rb')*+)("?)')


def _breaks(text: bytes) -> int:
    """Line breaks, of either kind."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def _after_break(text: bytes, low: int, high: int, otherwise: int = 0) -> int:
    """The place behind the last line break within a part of the text."""
    found = max(text.rfind(b"\n", low, high), text.rfind(b"\r", low, high))
    return found + 1 if found >= 0 else otherwise
