"""Roles of columns, read from a YAML file.

    label: clicked                                  # 0 or 1
    dense: {price: log1p, age: {transform: none, fill: -1}}
    categorical: [country, device, {item: {min_count: 5}}]
    multi: {tags: {separator: "|"}}
    history: {last_items: {of: item, max_length: 50}}
    user: customer
    time: {column: seen_at, derive: [hour, weekday]}
    split: {by: time, valid: 0.1, test: 0.1}

`label` and something to embed are needed; docs/your-data.md explains every key.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from embtab.datasets.roles import OF_SPACE, WAYS, Csv, Dense, Ids, Roles, Split, Time
from embtab.datasets.schema import SPLITS
from embtab.errors import UserError
from embtab.yaml_files import read_yaml


def read_roles(file: str | Path) -> Roles:
    """The roles that a YAML file gives to columns.

    Raises:
        UserError: when the file cannot be read, gives a column two roles, or has an unknown key or a wrong value.
    """
    given = read_yaml(file, _Loader)
    try:
        return _roles(given, Path(file).stem)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The map, after a look at its keys."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: a key must be a name")
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice; give it one role")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_KEYS = ("name", "label", "dense", "categorical", "multi", "history", "user", "time", "split", "min_count", "csv")


def _roles(given: Any, name: str) -> Roles:
    if not isinstance(given, dict):
        raise UserError(f"expected keys such as label and categorical, got {given!r}")
    for key in given:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; there are {', '.join(_KEYS)}")
    if "label" not in given:
        raise UserError("key 'label' is missing; name the column that holds 0 or 1")
    defaults = {"min_count": _typed("min_count", given["min_count"], int)} if "min_count" in given else {}
    pooling = {"categorical": "sum", "multi": "mean", "history": "none"}
    features = [
        _ids(role, column, {"pooling": pooling[role], **defaults}, options)
        for role in pooling
        for column, options in _entries(role, given.get(role), _only_options)
    ]
    features = [_as_target(feature, features) for feature in features]
    dense = [
        _filled(Dense, f"dense column {column!r}", options, ("transform", "fill"), column=column)
        for column, options in _entries("dense", given.get("dense"), lambda text: {"transform": text})
    ]
    time = None
    if given.get("time") is not None:
        options = dict(given["time"]) if isinstance(given["time"], dict) else {"column": given["time"]}
        column = _name("time: column", options.pop("column", None))
        time = _filled(Time, "time", options, ("format", "unit", "derive"), column=column)
    return Roles(
        label=_name("label", given["label"]),
        features=tuple(features),
        split=_split(given.get("split"), time is not None),
        dense=tuple(dense),
        user=None if given.get("user") is None else _name("user", given["user"]),
        time=time,
        csv=_filled(Csv, "csv", given.get("csv") or {}, ("delimiter", "columns", "quote", "escape")),
        name=_name("name", given.get("name", name)),
    )


_OPTIONS = {
    "categorical": (*OF_SPACE, "of"),
    "multi": (*OF_SPACE, "of", "separator", "pooling"),
    "history": ("of", "separator", "pooling", "max_length"),
}


def _ids(role: str, column: str, defaults: dict[str, Any], options: Any) -> Ids:
    where = f"{role} column {column!r}"
    feature = _filled(Ids, where, options, _OPTIONS[role], column=_name(where, column), role=role)
    if feature.of is not None and (given := [name for name in OF_SPACE if name in options]):
        raise UserError(f"{where}: {given[0]} is that of {feature.of!r}; leave it out here")
    return replace(feature, **{key: value for key, value in defaults.items() if key not in options})


def _as_target(feature: Ids, features: list[Ids]) -> Ids:
    """The feature with the id space of the one it names."""
    targets = [each for each in features if each.column == feature.of]
    return replace(feature, **{name: getattr(targets[0], name) for name in OF_SPACE}) if targets else feature


def _only_options(text: str) -> dict[str, Any]:
    raise UserError(f"expected options such as {{min_count: 5}}, got {text!r}")


def _entries(role: str, given: Any, shorthand: Callable[[str], dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Columns and their options from one name, a map, or a list of names and maps."""
    entries: list[tuple[str, dict[str, Any]]] = []
    for item in given if isinstance(given, list) else [] if given is None else [given]:
        for column, options in item.items() if isinstance(item, dict) else [(item, None)]:
            try:
                options = shorthand(options) if isinstance(options, str) else options or {}
            except UserError as error:
                raise UserError(f"{role} column {column!r}: {error}") from None
            entries.append((_name(role, column), options))
    return entries


def _name(role: str, given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise UserError(f"{role}: expected a name, got {given!r} (YAML needs quotes around names such as '1' or 'yes')")
    return given


_Role = TypeVar("_Role", Ids, Dense, Time, Csv)


def _filled(kind: type[_Role], where: str, options: Any, known: Sequence[str], **fixed: Any) -> _Role:
    """A role with its options, each of the type of its field."""
    if not isinstance(options, dict):
        raise UserError(f"{where}: expected options such as {{{known[0]}: ...}}, got {options!r}")
    types = typing.get_type_hints(kind)
    for key in options:
        if key not in known:
            raise UserError(f"{where}: unknown option {key!r}; there are {', '.join(known)}")
    return kind(**{key: _typed(f"{where}: {key}", value, types[key]) for key, value in options.items()}, **fixed)


def _typed(where: str, value: Any, wanted: Any) -> Any:
    accepted = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_name(where, item) for item in items)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is None or type(value) not in accepted:
        names = " or ".join(kind.__name__ for kind in accepted if kind is not type(None))
        raise UserError(f"{where} must be {names}, got {value!r}")
    return value


_SPLIT_KEYS = {
    "time": ("valid", "test"),
    "random": ("valid", "test", "seed"),
    "order": ("valid", "test"),
    "column": ("column", "train", "valid", "test"),
    "files": ("valid", "test"),
}


def _split(given: Any, has_time: bool) -> Split:
    given = given if given is not None else {"by": "time" if has_time else "random"}
    given = {"by": given} if isinstance(given, str) else given
    if not isinstance(given, dict) or given.get("by") not in WAYS:
        raise UserError(f"split: 'by' must be one of {', '.join(WAYS)}, got {given!r}")
    by, options = given["by"], {key: value for key, value in given.items() if key != "by"}
    for key in options:
        if key not in _SPLIT_KEYS[by]:
            raise UserError(f"split by {by}: unknown option {key!r}; there are {', '.join(_SPLIT_KEYS[by])}")
    if by in ("time", "random", "order"):
        kinds = {"valid": float, "test": float, "seed": int}
        return Split(by, **{key: _typed(f"split: {key}", value, kinds[key]) for key, value in options.items()})
    names: dict[str, tuple[str, ...]] = {split: (split,) for split in SPLITS} if by == "column" else {}
    column = _name("split: column", options.pop("column", None)) if by == "column" else None
    for split, values in options.items():
        names[split] = tuple(str(value) for value in (values if isinstance(values, list) else [values]))
    return Split(by, column=column, names=names)
