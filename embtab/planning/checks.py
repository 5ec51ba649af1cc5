"""A plan that comes from a file, a bundle's or a checkpoint's, may claim anything: types, then numbers, are checked.

What a method's numbers mean is said in its own file, by `Encoding.check`, `shapes` and `check_arrays`; everything
here holds for every method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from embtab.errors import UserError, shown
from embtab.features import Feature, id_spaces
from embtab.methods import METHODS, PRECISIONS, Encoding, Table

MAX_DIM = 2**20


class _WrongError(Exception):
    """A value is not of the type that its field has."""


def read_feature(entry: Any) -> Feature:
    """A feature, of what `Plan.to_dict` gives.

    Raises:
        UserError: for a field that is unknown, missing or cannot be.
    """
    feature: Feature = _read(Feature, entry, "feature")
    return feature


def read_table(entry: Any) -> Table:
    """A table, of what `Plan.to_dict` gives.

    Raises:
        UserError: for a field that is unknown, missing or cannot be.
    """
    table = _read(Table, entry, "table")
    if not (table.num_rows >= 0 and 1 <= table.width < 2**31 and table.precision in PRECISIONS):
        raise UserError(
            f"table {shown(table.name)}: {table.num_rows} rows of {table.width} {shown(table.precision)} cannot be"
        )
    return table


def read_encoding(space: str, entry: Any) -> Encoding:
    """An encoding, of what `Plan.to_dict` gives.

    Raises:
        UserError: for an unknown method, or a field that is unknown, missing or cannot be.
    """
    name = entry.get("method") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"feature {shown(space)}: unknown method {shown(name)}; there are {', '.join(METHODS)}")
    fields = {key: value for key, value in entry.items() if key != "method"}
    return _read(METHODS[name], fields, f"feature {shown(space)}")


def check_plan(
    features: Sequence[Feature], encodings: Mapping[str, Encoding], tables: Mapping[str, Table], dim: int
) -> None:
    """Every feature has an encoding of its ids, which reads tables of the plan, as large as its own numbers say.

    Raises:
        UserError: naming the feature, the table and the numbers.
    """
    spaces = {space.name: space for space in id_spaces(features)}
    if spaces.keys() != encodings.keys():
        name = next(iter(spaces.keys() ^ encodings.keys()))
        raise UserError(f"feature {shown(name)} has no encoding, or an encoding has no feature")
    for name, encoding in encodings.items():
        try:
            _check_encoding(encoding, tables, dim, spaces[name])
        except UserError as error:
            raise UserError(f"feature {shown(name)}, method {encoding.method!r}: {str(error)[:300]}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"feature {shown(name)}, method {encoding.method!r}: cannot be: {error!r}") from None


def _check_encoding(encoding: Encoding, tables: Mapping[str, Table], dim: int, space: Feature) -> None:
    if encoding.dim != dim:
        raise UserError(f"vectors of {encoding.dim} numbers in a plan of {dim}")
    if encoding.num_ids not in (None, space.num_ids):
        raise UserError(f"{encoding.num_ids} ids of a feature that has {space.num_ids}")
    if encoding.num_ids is not None and space.hashed:
        raise UserError("needs ids numbered from 0, and those of the feature are any numbers")
    encoding.check()
    shapes = encoding.shapes()
    if len(shapes) != len(encoding.tables):
        raise UserError(f"reads {len(encoding.tables)} tables, and its numbers are of {len(shapes)}")
    for name, shape in zip(encoding.tables, shapes, strict=True):
        table = tables[name]
        if (table.num_rows, table.width) != shape:
            raise UserError(
                f"reads {shape[0]} rows of {shape[1]} numbers from table {shown(name)}, "
                f"which has {table.num_rows} rows of {table.width}"
            )


def check_arrays(encodings: Mapping[str, Encoding], tensors: Mapping[str, Any]) -> None:
    """Arrays beside the tables are those that the encodings need, and their values lead to rows that are there.

    Args:
        encodings: by id space.
        tensors: arrays by "space.array", among others: of NumPy, or tensors on the CPU.

    Raises:
        UserError: naming feature and array.
    """
    for space, encoding in encodings.items():
        held = {}
        for name, spec in encoding.arrays().items():
            found = tensors.get(f"{space}.{name}")
            if found is None and spec.serving:
                raise UserError(f"feature {shown(space)}: array {name!r} is missing")
            if found is not None:
                held[name] = np.asarray(found)
                if held[name].shape != spec.shape or held[name].dtype != spec.dtype:
                    raise UserError(
                        f"feature {shown(space)}: array {name!r} is {held[name].dtype} {list(held[name].shape)}, "
                        f"not {spec.dtype} {list(spec.shape)}"
                    )
        try:
            encoding.check_arrays(held)
        except UserError as error:
            raise UserError(f"feature {shown(space)}, method {encoding.method!r}: {str(error)[:300]}") from None


def _read(kind: Any, entry: Any, what: str) -> Any:
    """A dataclass of plain data, each value of its field's type."""
    types = _types(kind)
    if not isinstance(entry, Mapping) or not entry.keys() <= types.keys():
        unknown = (
            "it is no object" if not isinstance(entry, Mapping) else shown(next(iter(entry.keys() - types.keys())))
        )
        raise UserError(f"not a plan: {what} has an unknown field: {unknown}")
    try:
        values = {name: _valued(value, types[name]) for name, value in entry.items()}
    except _WrongError:
        wrong = next(name for name, value in entry.items() if not _fits(value, types[name]))
        raise UserError(f"not a plan: {what}: {wrong} cannot be {shown(entry[wrong])}") from None
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"not a plan: {what}: {error}") from None


@cache
def _types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.compare}


def _fits(value: Any, hint: Any) -> bool:
    try:
        _valued(value, hint)
    except _WrongError:
        return False
    return True


def _valued(value: Any, hint: Any) -> Any:
    """The value as its field holds it: lists become tuples; whole numbers are of 64 bits."""
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        hint = next((each for each in arguments if _fits(value, each)), None)
        arguments = get_args(hint)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(each) == len(value):
            return tuple(map(_valued, value, each))
    elif hint is NoneType and value is None:
        return None
    elif hint in (int, bool, str) and type(value) is hint and (hint is not int or -(2**63) <= value < 2**63):
        return value
    raise _WrongError
