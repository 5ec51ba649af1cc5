"""Raw behaviour logs as one table of events, each user's in time order.

Formats, told apart by the file's name unless `kind` says which:

- s3rec: `NAME.txt`, one user a line in time order, "user item item ..."; beside it `NAME_item2attributes.json` (item ->
  attribute ids) and, where published, `NAME_sample.txt` ("user negative negative ...", the negatives of the test).
- ml-100k: a folder with `u.data` and, where they are there, `u.item` (genres) and `u.user`. Every rating is an event.
- taobao: `UserBehavior.csv`, "user,item,category,behaviour,timestamp" without a header; page views only.
- amazon: reviews as JSON lines, `*.json` or `*.jsonl`: reviewerID or user_id, asin, unixReviewTime or timestamp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from embtab.errors import DataError, UserError, shown

KINDS = ("auto", "s3rec", "ml-100k", "taobao", "amazon")
_GENRES = 19  # flags at the end of a line of u.item


@dataclass(frozen=True)
class Events:
    """Events of all users.

    Attributes:
        name: of the dataset.
        rows: columns user and item (String) and, where the format has times, time (Int64); users one after the other,
            each in time order.
        categories: item -> category, where the format has categories.
        sides: columns user and one String column per attribute of a user, where the format has them.
        negatives: the published negatives of the test, by user.
        dropped: how many raw rows were left out, by reason.
    """

    name: str
    rows: pl.DataFrame
    categories: dict[str, str] | None = None
    sides: pl.DataFrame | None = None
    negatives: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def has_times(self) -> bool:
        """Whether events of different users can be compared in time."""
        return "time" in self.rows.columns


def read_events(raw: Path, kind: str = "auto") -> Events:
    """Reads a behaviour log; see the top of this file for the formats.

    Args:
        raw: a file, or the folder of ml-100k.
        kind: one of KINDS.

    Raises:
        UserError: for an unknown kind, or a file whose kind its name does not tell.
        DataError: for a missing or bad file, naming file and line.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
    if not raw.exists():
        raise DataError(f"{raw}: no such file or folder; give a behaviour log")
    kind = _kind_of(raw) if kind == "auto" else kind
    readers = {"s3rec": _read_s3rec, "ml-100k": _read_ml100k, "taobao": _read_taobao, "amazon": _read_amazon}
    return readers[kind](raw)


def _kind_of(raw: Path) -> str:
    if raw.is_dir() or raw.name == "u.data":
        return "ml-100k"
    kinds = {".txt": "s3rec", ".csv": "taobao", ".json": "amazon", ".jsonl": "amazon"}
    if raw.suffix not in kinds:
        raise UserError(f"{raw}: the name does not tell what it is; say --kind {', '.join(KINDS[1:])}")
    return kinds[raw.suffix]


def _read_s3rec(file: Path) -> Events:
    histories = _lists(file)
    users = [user for user, items in histories.items() for _ in items]
    rows = pl.DataFrame({"user": users, "item": [item for items in histories.values() for item in items]})
    sample = file.with_name(f"{file.stem}_sample.txt")
    negatives = _lists(sample) if sample.exists() else {}
    for user, items in negatives.items():
        if user not in histories or not set(items).isdisjoint(histories[user]):
            raise DataError(f"{sample}: user {user}: unknown, or a negative is in the history in {file.name}")
    beside = file.with_name(f"{file.stem}_item2attributes.json")
    return Events(file.stem, rows, _first_attributes(beside) if beside.exists() else None, negatives=negatives)


def _lists(file: Path) -> dict[str, list[str]]:
    """Lines "key value value ...", each key once."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(file), 1):
        key, *values = line.split() or [""]
        if not values:
            raise DataError(f"{file}: line {number}: must be 'user item item ...', got {shown(line)}")
        if key in found:
            raise DataError(f"{file}: line {number}: user {key} has a line already; one line per user")
        found[key] = values
    return found


def _first_attributes(file: Path) -> dict[str, str]:
    """An item's first attribute stands for its category; "" where it has none."""
    try:
        attributes = json.loads(file.read_text(encoding="utf-8"))
        return {item: _first(values) for item, values in attributes.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: must be a JSON object of item -> list of attributes ({error})") from error


def _first(values: object) -> str:
    if not isinstance(values, list):
        raise TypeError(f"{shown(values)} is no list")
    return _text(values[0]) if values else ""


def _read_ml100k(raw: Path) -> Events:
    folder = raw if raw.is_dir() else raw.parent
    file = folder / "u.data"
    if not file.exists():
        raise DataError(f"{file}: no such file; a folder must be ml-100k's")
    rows = pl.DataFrame(
        [_cut(file, number, line, "\t", 4) for number, line in enumerate(_lines(file), 1)],
        schema=["user", "item", "rating", "time"],
        orient="row",
    )
    categories = sides = None
    if (folder / "u.item").exists():
        # The combination of genres is the category: there is no main one.
        lines = enumerate(_lines(folder / "u.item", "latin-1"), 1)
        movies = [_cut(folder / "u.item", number, line, "|", 5 + _GENRES) for number, line in lines]
        _refuse_twice(folder / "u.item", [movie[0] for movie in movies])
        categories = {movie[0]: "".join(movie[5:]) for movie in movies}
    if (folder / "u.user").exists():
        lines = enumerate(_lines(folder / "u.user"), 1)
        users = [_cut(folder / "u.user", number, line, "|", 5)[:4] for number, line in lines]
        _refuse_twice(folder / "u.user", [user[0] for user in users])
        sides = pl.DataFrame(users, schema=["user", "age", "gender", "occupation"], orient="row")
    return Events("ml-100k", _in_time(file, rows), categories, sides)


def _cut(file: Path, number: int, line: str, separator: str, columns: int) -> list[str]:
    values = line.split(separator)
    if len(values) != columns:
        raise DataError(f"{file}: line {number}: has {len(values)} columns, not {columns}")
    return values


def _read_taobao(file: Path) -> Events:
    columns = ("user", "item", "category", "behaviour", "time")
    try:
        table = pl.read_csv(file, has_header=False, infer_schema=False, quote_char=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: not a comma-separated file: {str(error).splitlines()[0]}") from error
    if table.width != len(columns):
        raise DataError(f"{file}: has {table.width} columns, not {len(columns)} ({', '.join(columns)})")
    table.columns = list(columns)
    for name in columns:
        _refuse(file, table[name].is_null(), f"column {name}: is empty")
    _refuse_times(file, table)  # before other rows are left out, which are lines as well
    views = table.filter(pl.col("behaviour") == "pv")
    if views.is_empty():
        raise DataError(f"{file}: holds no page view (behaviour pv)")
    firsts = views.unique("item", keep="first", maintain_order=True)
    categories = dict(zip(firsts["item"], firsts["category"], strict=True))
    dropped = {"not a page view": len(table) - len(views)}
    return Events("taobao", _in_time(file, views), categories, dropped=dropped)


def _read_amazon(file: Path) -> Events:
    rows = [_review(line, f"{file}: line {number}") for number, line in enumerate(_lines(file), 1)]
    return Events(file.stem, _in_time(file, pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")))


def _review(line: str, where: str) -> tuple[str, str, str]:
    """User, item and time of a review."""
    try:
        review = json.loads(line)
        user = review["reviewerID"] if "reviewerID" in review else review["user_id"]
        time = review["unixReviewTime"] if "unixReviewTime" in review else review["timestamp"]
        if isinstance(time, bool) or (isinstance(time, float) and not time.is_integer()):
            raise ValueError(f"the time {time} is not whole")
        return _text(user), _text(review["asin"]), time if isinstance(time, str) else str(int(time))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        wanted = "reviewerID (or user_id), asin and unixReviewTime (or timestamp)"
        raise DataError(f"{where}: must be a JSON object with {wanted} ({' '.join(str(error).split())})") from error


def _text(value: object) -> str:
    """A name out of JSON, as text.

    Raises:
        TypeError: for what is neither text nor a whole number.
        ValueError: for half a surrogate pair, which is no text.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{shown(value)} is no name")
    str(value).encode()
    return str(value)


def _in_time(file: Path, rows: pl.DataFrame) -> pl.DataFrame:
    """Columns user, item, time; users by name, each in time order; equal times stay in the file's order."""
    _refuse_times(file, rows)
    return rows.select("user", "item", pl.col("time").cast(pl.Int64)).sort("user", "time", maintain_order=True)


def _refuse_times(file: Path, rows: pl.DataFrame) -> None:
    _refuse(file, rows["time"].cast(pl.Int64, strict=False).is_null(), "the timestamp must be a whole number")


def _refuse(file: Path, bad: pl.Series, message: str) -> None:
    where = bad.arg_true()
    if len(where):
        raise DataError(f"{file}: line {where[0] + 1}: {message}")


def _refuse_twice(file: Path, keys: list[str]) -> None:
    _refuse(file, ~pl.Series(keys).is_first_distinct(), "its first column stands on an earlier line already")


def _lines(file: Path, encoding: str = "utf-8-sig") -> list[str]:
    try:
        lines = file.read_text(encoding=encoding).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not text (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    lines = lines if lines[-1] else lines[:-1]
    if not lines:
        raise DataError(f"{file}: is empty; fetch it again")
    return lines
