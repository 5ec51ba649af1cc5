"""What each column of a table is for; roles_file.py reads it from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from embtab.datasets.criteo import DENSE_TRANSFORMS, FLOAT32_MAX
from embtab.datasets.splits import check_fractions
from embtab.errors import UserError

WAYS = ("time", "random", "order", "column", "files")
DERIVED = {"hour": 24, "weekday": 7}
UNITS = ("s", "ms", "us", "ns")
OF_SPACE = ("min_count", "raw", "hashed", "num_ids")
"""Options of an id space, which all columns of it share."""
KEY = "__split__"
"""A column of this name lies beside the others while a table is prepared; no column may be called so."""


@dataclass(frozen=True)
class Dense:
    """A column of numbers."""

    column: str
    transform: str = "log1p"
    """One of criteo's DENSE_TRANSFORMS."""
    fill: float | None = None
    """What a null (or NaN) becomes, after the transform; None: a null is a mistake."""


@dataclass(frozen=True)
class Ids:
    """A categorical column: one value a row, or a list of values (`multi`, `history`)."""

    column: str
    role: str
    min_count: int = 2
    """Values that occur less often in the training split share id 0."""
    raw: bool = False
    """The column holds ids already: whole numbers from 0."""
    hashed: bool = False
    """The column holds whole numbers of 64 bits, each an id as it is; nothing counts or numbers them."""
    num_ids: int | None = None
    """With `raw`: the cardinality; None: one more than the largest id. With `hashed`: about how many different ids
    there are; None to estimate it."""
    of: str | None = None
    """The categorical column whose ids these are."""
    separator: str | None = None
    """Of the values of a list that is written as text."""
    pooling: str = "sum"
    max_length: int = 50
    """Of a history: the last values are kept."""

    @property
    def is_list(self) -> bool:
        """Whether a row holds any number of values."""
        return self.role != "categorical"

    @property
    def is_id(self) -> bool:
        """Whether the values are ids as they stand."""
        return self.raw or self.hashed

    @property
    def space(self) -> str:
        """The column that names the id space."""
        return self.of or self.column


@dataclass(frozen=True)
class Time:
    """When a row happened."""

    column: str
    format: str | None = None
    """Of text (or whole numbers such as 14102100), in the signs of strftime; None: numbers, or ISO 8601."""
    unit: str | None = None
    """Of numbers that count from 1970: s, ms, us or ns."""
    derive: tuple[str, ...] = ()
    """Features made of it: COLUMN_hour (0 to 23) and COLUMN_weekday (0 is Monday)."""


@dataclass(frozen=True)
class Split:
    """How rows are shared out to train, valid and test."""

    by: str
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0
    column: str | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By column: the values of each split; by files: patterns of the names of files of valid and test."""


@dataclass(frozen=True)
class Csv:
    """How text is read."""

    delimiter: str | None = None
    """None: a tab in .tsv files, a comma in all others."""
    columns: tuple[str, ...] = ()
    """Names of the columns of files without a header."""
    quote: str | None = None
    """'' where quotes are part of the text; '"' where they hold values together, even over lines; None: the latter, but
    what may have been meant otherwise is refused."""
    escape: str | None = None
    """Stands before quotes within quotes; None: they are doubled."""


@dataclass(frozen=True)
class Roles:
    """The columns of a table and what they are for.

    Raises:
        UserError: when a column has two roles, or roles do not fit together.
    """

    label: str
    features: tuple[Ids, ...]
    split: Split
    dense: tuple[Dense, ...] = ()
    user: str | None = None
    time: Time | None = None
    csv: Csv = Csv()
    name: str = "table"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def columns(self) -> dict[str, str]:
        """Every column that is read, with (one of) its roles."""
        named = {self.label: "label", **{each.column: "dense" for each in self.dense}}
        named |= {each.column: each.role for each in self.features}
        others = [(self.user, "user"), (self.time.column if self.time else None, "time"), (self.split.column, "split")]
        return named | {column: role for column, role in others if column is not None and column not in named}

    @property
    def derived(self) -> dict[str, str]:
        """The features made of the time: their names, and what they tell."""
        return {f"{self.time.column}_{part}": part for part in self.time.derive} if self.time else {}

    @property
    def user_number(self) -> str | None:
        """The column that numbers users; not their own column's name where that is a model input as well."""
        taken = {feature.column for feature in self.features} | {dense.column for dense in self.dense}
        return f"{self.user}_number" if self.user in taken else self.user


def _check(roles: Roles) -> None:
    """What no single key shows."""
    given = [(roles.label, "label"), *((each.column, "dense") for each in roles.dense)]
    given += [(each.column, each.role) for each in roles.features]
    seen: dict[str, str] = {}
    for column, role in given:
        if column in seen:
            raise UserError(f"column {column!r} is given the roles {seen[column]} and {role}; it can have only one")
        seen[column] = role
    for column in (*seen, *roles.derived):
        if "/" in column or column.startswith(".") or column == KEY:
            raise UserError(f"column {column!r}: such a name cannot be used here; rename the column")
    if not roles.features and not roles.derived:
        raise UserError("no categorical, multi or history column is named, so there is nothing to embed")
    if roles.label in (roles.user, roles.time.column if roles.time else None, roles.split.column):
        raise UserError(f"column {roles.label!r} is the label and can have no other role")
    for made in (*roles.derived, roles.user_number):
        if made in seen:
            raise UserError(f"column {made!r} has the name of one that is made of another column; rename it")
    for dense in roles.dense:
        if dense.transform not in DENSE_TRANSFORMS:
            known = ", ".join(DENSE_TRANSFORMS)
            raise UserError(f"dense column {dense.column!r}: transform must be one of {known}; got {dense.transform!r}")
        if dense.fill is not None and not abs(dense.fill) <= FLOAT32_MAX:
            raise UserError(f"dense column {dense.column!r}: fill must be a finite float32 number, got {dense.fill}")
    for feature in roles.features:
        _check_feature(feature, {each.column: each for each in roles.features})
    _check_time(roles.time)
    _check_split(roles)
    if roles.csv.delimiter is not None and len(roles.csv.delimiter.encode()) != 1:
        raise UserError(f"csv: delimiter must be one character, got {roles.csv.delimiter!r}")
    if roles.csv.quote not in (None, "", '"'):
        raise UserError(f"csv: quote must be '\"', or '' where quotes are text; got {roles.csv.quote!r}")
    if roles.csv.escape is not None and (len(roles.csv.escape.encode()) != 1 or roles.csv.escape == '"'):
        raise UserError(f"csv: escape must be one character and not the quote, got {roles.csv.escape!r}")


def _check_feature(feature: Ids, known: Mapping[str, Ids]) -> None:
    where = f"{feature.role} column {feature.column!r}"
    if feature.role == "history" and feature.of is None:
        raise UserError(f"{where}: give `of`, the categorical column whose ids the history holds")
    if feature.of is not None:
        target = known.get(feature.of)
        if target is None or target.role != "categorical" or target.of is not None:
            targets = [each.column for each in known.values() if each.role == "categorical" and each.of is None]
            raise UserError(f"{where}: of {feature.of!r} is no categorical column; there are {', '.join(targets)}")
        if any(getattr(feature, name) != getattr(target, name) for name in OF_SPACE):
            raise UserError(f"{where}: {', '.join(OF_SPACE)} must be those of {feature.of!r}")
    if feature.raw and feature.hashed:
        raise UserError(f"{where}: raw ids are numbered from 0, hashed ones are any number; choose one of them")
    if feature.num_ids is not None and not feature.is_id:
        raise UserError(f"{where}: num_ids goes with raw: true or hashed: true; else the ids are counted")
    if feature.pooling not in (("sum", "mean", "none") if feature.role == "history" else ("sum", "mean")):
        raise UserError(f"{where}: pooling must be sum or mean (none for a history), got {feature.pooling!r}")
    if feature.separator is not None and (not feature.separator or not feature.is_list):
        raise UserError(f"{where}: separator must be some text, and goes with multi and history")
    for option in ("min_count", "num_ids", "max_length"):
        value = getattr(feature, option)
        if value is not None and value < 1:
            raise UserError(f"{where}: {option} must be 1 or more, got {value}")
        if value is not None and value >= 2**31:
            raise UserError(f"{where}: {option} must be below 2^31, got {value}")


def _check_time(time: Time | None) -> None:
    if time is None:
        return
    if unknown := [part for part in time.derive if part not in DERIVED]:
        raise UserError(f"time: derive knows {', '.join(DERIVED)}; got {unknown[0]!r}")
    if time.unit is not None and time.unit not in UNITS:
        raise UserError(f"time: unit must be one of {', '.join(UNITS)}; got {time.unit!r}")
    if time.unit is not None and time.format is not None:
        raise UserError("time: give unit (of numbers) or format (of text), not both")


def _check_split(roles: Roles) -> None:
    split = roles.split
    if split.by == "time" and roles.time is None:
        raise UserError("split by time: key 'time' is missing; name the column that says when a row happened")
    if split.by in ("time", "random", "order"):
        check_fractions(split.valid, split.test)
    if split.seed < 0:
        raise UserError(f"split: seed must be 0 or more, got {split.seed}")
    if split.by == "files" and not split.names:
        raise UserError("split by files: give valid, test or both, such as valid: 'valid*.parquet'")
    values = [value for names in split.names.values() for value in names]
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"split: {twice[0]!r} is named by two splits")
