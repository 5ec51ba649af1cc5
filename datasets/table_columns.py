"""Columns as they come to columns as they are counted and written: text for values, numbers for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from embtab.datasets.criteo import transformed
from embtab.datasets.estimate import Distinct
from embtab.datasets.roles import KEY, Dense, Ids, Roles, Time
from embtab.datasets.schema import SPLITS
from embtab.datasets.table_files import Piece, TableFile
from embtab.errors import DataError, listed, shown

_KINDS = {
    "label": ("whole numbers", "numbers", "booleans"),
    "dense": ("whole numbers", "numbers", "booleans"),
    "raw": ("whole numbers",),
    "categorical": ("text", "whole numbers", "booleans"),
    "list": ("lists of text", "lists of whole numbers", "text"),
    "raw list": ("lists of whole numbers", "text"),
    "hashed": ("whole numbers",),
    "hashed list": ("lists of whole numbers", "text"),
    "user": ("text", "whole numbers"),
    "time": ("whole numbers", "numbers", "dates", "text"),
    "split": ("text", "whole numbers", "booleans"),
}
_FIXES = {
    "label": "make it 0 or 1",
    "dense": "write numbers, or make the column categorical",
    "raw": "ids must be whole numbers; leave raw out to have values numbered",
    "categorical": "write text or whole numbers, or make the column dense; lists are multi",
    "list": "write lists of text or of whole numbers; single values are categorical",
    "raw list": "write lists of whole numbers",
    "hashed": "ids must be whole numbers; leave hashed out to have values numbered",
    "hashed list": "write lists of whole numbers",
    "user": "write text or whole numbers",
    "time": "write dates, numbers or ISO 8601",
    "split": "write text or whole numbers",
}
_NULLS = "nulls only"  # the kind of a column without any value, which goes with every other
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ISO = (
    "%Y-%m-%dT%H:%M:%S%.f%z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M%z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
)
_ZONES = (
    (r"(:\d\d(?:\.\d+)?) ?(?:UTC|GMT|Z|z)$", "${1}+00:00"),
    (r"(:\d\d(?:\.\d+)?) ?([+-]\d\d)$", "${1}${2}:00"),
    (r"(:\d\d(?:\.\d+)?) ([+-]\d\d:?\d\d)$", "${1}${2}"),
)
"""Ways to end a time, and how ISO 8601 does."""


def check_columns(files: list[TableFile], roles: Roles) -> None:
    """Compares the columns of every file with the roles, and with each other.

    Raises:
        DataError: for a missing column, a kind of values that a role cannot have, or files that differ.
    """
    features = {feature.column: feature for feature in roles.features}
    for column, role in roles.columns.items():
        known: tuple[str, TableFile] | None = None
        for file in files:
            if column not in file.columns:
                raise DataError(f"{file.path}: has no column {column!r}; there are {listed(file.columns)}")
            kind, where = _kind(file.columns[column]), f"{file.path}, column {column!r}"
            if kind.endswith(_NULLS):
                continue
            _check_kind(where, kind, role, features.get(column), file.is_parquet)
            known = known or (kind, file)
            if kind != known[0] and role not in ("label", "dense"):
                raise DataError(f"{where}: holds {kind} but {known[1].path} {known[0]}; write all files alike")


def _check_kind(where: str, kind: str, role: str, feature: Ids | None, is_parquet: bool) -> None:
    if feature is not None:
        kinds = ["raw"] * feature.raw + ["hashed"] * feature.hashed + ["list"] * feature.is_list
        role = " ".join(kinds) or "categorical"
    if is_parquet and kind not in _KINDS[role]:
        raise DataError(f"{where}: holds {kind}, which the role {role} cannot have; {_FIXES[role]}")
    if kind == "text" and feature is not None and feature.is_list and feature.separator is None:
        raise DataError(f"{where}: is text; give the separator of its values, such as separator: '|'")


def _kind(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List | pl.Array):
        return f"lists of {_kind(dtype.inner)}"  # type: ignore[arg-type]
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "text"
    if dtype.is_integer():
        return "whole numbers"
    if dtype in (pl.Float32, pl.Float64, pl.Decimal):
        return "numbers"
    if dtype in (pl.Date, pl.Datetime):
        return "dates"
    return "booleans" if dtype == pl.Boolean else _NULLS if dtype == pl.Null else str(dtype)


@dataclass
class Stager:
    """Turns pieces into staged rows; `rows` counts those that went by.

    Attributes:
        roles: of the columns.
        rows: staged so far.
        rng: of a split at random.
        nulls: of each dense column.
        dates: whether the time is written as dates (True) or numbers (False); None before the first row.
        distinct: how many different ids the id spaces of hashed columns have.
    """

    roles: Roles
    rows: int = 0
    rng: np.random.Generator = field(init=False)
    nulls: dict[str, int] = field(init=False)
    dates: bool | None = None
    distinct: dict[str, Distinct] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.roles.split.seed)
        self.nulls = {dense.column: 0 for dense in self.roles.dense}
        self.distinct = {feature.space: Distinct() for feature in self.roles.features if feature.hashed}

    def staged(self, piece: Piece, split: int) -> pl.DataFrame:
        """The label and dense columns (Float32), values and the user (String or lists of it; raw and hashed
        ids Int64), and KEY.

        Args:
            piece: rows of a file.
            split: the split of the file, 0 to 2, where files are shared out.

        Raises:
            DataError: for the first wrong value, naming its place.
        """
        roles = self.roles
        columns = {roles.label: _label(piece, roles.label)}
        for dense in roles.dense:
            columns[dense.column] = self._dense(piece, dense)
        for feature in roles.features:
            values = _lists(piece, feature) if feature.is_list else _values(piece, feature)
            if feature.hashed:
                self.distinct[feature.space].add(
                    (values.explode().drop_nulls() if feature.is_list else values).to_numpy()
                )
            columns[feature.column] = values
        if roles.user is not None and roles.user_number is not None:
            columns[roles.user_number] = _present(piece, roles.user, "the user of a row must be known")
        moments = None if roles.time is None else self._moments(piece, roles.time)
        if roles.time is not None and moments is not None:
            for name, part in roles.derived.items():
                columns[name] = _derived(piece, roles.time, moments, part)
        columns[KEY] = self._key(piece, split, moments)
        self.rows += piece.rows.height
        return pl.DataFrame(columns)

    def _dense(self, piece: Piece, dense: Dense) -> pl.Series:
        numbers = _numbers(piece, dense.column, "must be a number or blank").fill_nan(None)
        self.nulls[dense.column] += numbers.null_count()
        if dense.fill is None:
            _refuse(piece, dense.column, numbers.is_null(), "holds a null; fill it, or say with `fill` what it becomes")
        values = numbers.to_frame("x").select(transformed(pl.col("x"), dense.transform).cast(pl.Float32))["x"]
        _refuse(piece, dense.column, values.is_infinite().fill_null(False), "must be a finite number", show=True)
        return values if dense.fill is None else values.fill_null(dense.fill).cast(pl.Float32)

    def _moments(self, piece: Piece, time: Time) -> pl.Series:
        """The time as Datetime where it is written so, else as numbers."""
        given = piece.column(time.column)
        if time.format is not None:
            moments = _parsed(given.cast(pl.String), time.format)
        elif given.dtype == pl.String:
            moments = _iso_or_numbers(given)
        else:
            moments = given
        if moments.dtype == pl.Date:
            moments = moments.cast(pl.Datetime("ms"))  # which holds every date; microseconds do not
        elif moments.dtype != pl.Datetime:
            moments = moments.cast(pl.Int64 if moments.dtype.is_integer() else pl.Float64, strict=False)
        if isinstance(moments.dtype, pl.Datetime) and moments.dtype.time_zone is not None:
            moments = moments.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        rule = f"must be a time written as {time.format}" if time.format else "must be a number or ISO 8601"
        wrong = moments.is_null() | (~(moments.abs() < 2**63) if moments.dtype.is_float() else False)
        _refuse(piece, time.column, wrong, rule, show=True)
        dates = moments.dtype == pl.Datetime
        if self.dates is not None and self.dates != dates and piece.rows.height:
            raise DataError(f"{piece.place(time.column, 0)}: numbers and dates are mixed; write all alike")
        self.dates = dates
        return moments

    def _key(self, piece: Piece, split: int, moments: pl.Series | None) -> pl.Series:
        """What rows are shared out by, Float64: rounding may join moments, never change their order."""
        height, way = piece.rows.height, self.roles.split
        if way.by == "time" and moments is not None:
            scale = 1e6 / _PER_SECOND[moments.dtype.time_unit] if isinstance(moments.dtype, pl.Datetime) else 1.0
            return moments.to_physical().cast(pl.Float64) * scale
        if way.by == "random":
            return pl.Series(self.rng.random(height))
        if way.by == "order":
            return pl.Series(np.arange(self.rows, self.rows + height, dtype=np.float64))
        if way.column is not None:
            values = _text(piece.column(way.column))
            numbers = {value: float(i) for i, name in enumerate(SPLITS) for value in way.names.get(name, ())}
            keys = values.replace_strict(numbers, default=None, return_dtype=pl.Float64)
            _refuse(piece, way.column, keys.is_null(), f"names no split; there are {', '.join(numbers)}", show=True)
            return keys
        return pl.Series(np.full(height, float(split)))


def _refuse(piece: Piece, column: str, wrong: pl.Series, rule: str, show: bool = False) -> None:
    rows = wrong.arg_true()
    if len(rows):
        value = piece.column(column)[rows[0]]
        got = f", got {shown(value.to_list() if isinstance(value, pl.Series) else value)}" if show else ""
        raise DataError(f"{piece.place(column, rows[0])}: {rule}{got}")


def _text(values: pl.Series) -> pl.Series:
    return values.cast(pl.String).fill_null("")


def _present(piece: Piece, column: str, rule: str) -> pl.Series:
    values = _text(piece.column(column))
    _refuse(piece, column, values == "", rule)
    return values


def _numbers(piece: Piece, column: str, rule: str) -> pl.Series:
    """Float64, null where there is no value; text that is no number breaks the rule."""
    given = piece.column(column)
    if given.dtype != pl.String:
        return given.cast(pl.Float64)
    given = given.str.strip_chars()
    spelt = given.str.to_lowercase().replace({"true": "1", "false": "0"})
    numbers = spelt.cast(pl.Float64, strict=False)
    _refuse(piece, column, numbers.is_null() & (given != ""), rule, show=True)
    return numbers


def _label(piece: Piece, column: str) -> pl.Series:
    rule = "the label must be 0 or 1"
    labels = _numbers(piece, column, rule)
    _refuse(piece, column, ~labels.is_in([0.0, 1.0]).fill_null(False), rule, show=True)
    return labels.cast(pl.Float32)


def _values(piece: Piece, feature: Ids) -> pl.Series:
    if not feature.is_id:
        return _text(piece.column(feature.column))
    ids = pl.select(_ids(pl.lit(piece.column(feature.column)), feature)).to_series()
    _refuse(piece, feature.column, ids.is_null(), _range(feature), show=True)
    return ids


def _ids(values: pl.Expr, feature: Ids) -> pl.Expr:
    """Int64, null where a value is no id."""
    numbers = values.cast(pl.Int64, strict=False)
    if feature.hashed:  # unsigned numbers above all signed ones are the negative number of the same bits
        return pl.coalesce(numbers, values.cast(pl.UInt64, strict=False).reinterpret(signed=True))
    end = feature.num_ids if feature.num_ids is not None else 2**63 - 1
    return pl.when(numbers.is_between(0, end, closed="left")).then(numbers)


def _range(feature: Ids) -> str:
    if feature.hashed:
        return "hashed ids must be whole numbers of 64 bits"
    end = f" below num_ids ({feature.num_ids})" if feature.num_ids is not None else ""
    return f"raw ids must be whole numbers from 0{end}"


def _lists(piece: Piece, feature: Ids) -> pl.Series:
    """Lists of the values; blanks and nulls in a `multi` are none, those in a history are blank values."""
    given = piece.column(feature.column)
    if given.dtype == pl.String:
        given = given.replace("", None).str.split(feature.separator or "|")
    given = given.cast(pl.List(pl.String)).fill_null([]).list.eval(pl.element().fill_null(""))
    if feature.role == "history":
        given = given.list.tail(feature.max_length)
    else:
        given = given.list.eval(pl.element().filter(pl.element() != ""))
    if not feature.is_id:
        return given
    ids = given.list.eval(_ids(pl.element(), feature))
    _refuse(piece, feature.column, ids.list.eval(pl.element().is_null()).list.any(), _range(feature), show=True)
    return ids


def _parsed(text: pl.Series, format: str) -> pl.Series:
    if "%H" in format and "%M" not in format:  # hours without minutes are refused
        text, format = text + " 00", format + " %M"
    try:
        return text.str.to_datetime(format, strict=False, time_unit="us")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"time: format {format!r}: {str(error).splitlines()[0]}") from error


def _iso_or_numbers(text: pl.Series) -> pl.Series:
    text = text.str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    if len(text) and numbers[0] is not None:
        whole = text.cast(pl.Int64, strict=False)
        return numbers if whole.null_count() else whole
    spelt = text
    for written, standard in _ZONES:
        spelt = spelt.str.replace(written, standard)
    ways = [_parsed(spelt.str.replace(" ", "T", literal=True), format) for format in _ISO]
    plain = [way.dt.replace_time_zone(None) if way.dtype.time_zone else way for way in ways]  # type: ignore[attr-defined]
    return pl.select(pl.coalesce(plain)).to_series()


def _derived(piece: Piece, time: Time, moments: pl.Series, part: str) -> pl.Series:
    unit = moments.dtype.time_unit if isinstance(moments.dtype, pl.Datetime) else time.unit
    if unit is None:
        raise DataError(f"{piece.place(time.column, 0)}: is a number; say with `unit` or `format` what it counts")
    # polars' own calendar panics or wraps around far from 1970; whole numbers know no such end.
    hours = moments.to_physical().cast(pl.Int64).to_numpy() // (3600 * _PER_SECOND[unit])
    return pl.Series(hours % 24 if part == "hour" else (hours // 24 + 3) % 7)  # 1970 began on a Thursday
