"""How a method is written: a name, a name with options, or a map from features to either of them.

A map with a key "name" may be either of the last two, for a feature may be called `name`. It is one method with options
where every other key is an option of that method, and else a map where every value is a method; {"features": {...}} is
a map whatever it holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from embtab.errors import UserError
from embtab.methods import METHODS

MethodSpec = str | Mapping[str, Any]
"""Such as "qr", {"name": "qr", "op": "sum", "precision": "int8"} with options of the method and the precision of its
rows, or {"C1": "dense", "*": "qr"}."""


def by_feature(method: MethodSpec) -> Mapping[str, Any] | None:
    """The map from features to methods; None where one method serves all."""
    if not isinstance(method, Mapping):
        return None
    if set(method) == {"features"} and isinstance(method["features"], Mapping):
        return method["features"]  # type: ignore[no-any-return]
    if "name" not in method or isinstance(method["name"], Mapping):
        return method
    if _has_options_only(method) or not _has_methods_only(method):
        return None
    return method


def label(method: MethodSpec) -> str:
    """A method's name with its options."""
    chosen_by = by_feature(method)
    if chosen_by is not None:
        return " ".join(f"{feature}:{label(spec)}" for feature, spec in chosen_by.items())
    name, options = named(method)
    return " ".join([str(name), *(f"{key}={value}" for key, value in options.items())])


def named(method: MethodSpec) -> tuple[str, dict[str, Any]]:
    """The name and the options of one method; whether there are such is not checked.

    Raises:
        UserError: where no name is given.
    """
    options = dict(method) if isinstance(method, Mapping) else {"name": method}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f'a method is a name, such as "qr", or a map with a name and options; got {method!r}')
    return name, options


def refuse_ambiguous(method: MethodSpec, features: Collection[str]) -> None:
    """Refuses one method with options that is a map of the features as well.

    Args:
        method: what `by_feature` has no map of.
        features: the names that a map may have.

    Raises:
        UserError: where both readings make sense.
    """
    if not isinstance(method, Mapping) or len(method) == 1 or not _has_methods_only(method):
        return
    if all(key == "*" or key in features for key in method):
        raise UserError(
            f"method {dict(method)!r} is {method['name']!r} with options, and a map of features as well; "
            'write the map as {"features": {...}}, or the method with its options as {"features": {"*": {...}}}'
        )


def options_of(method: str) -> dict[str, list[type]]:
    """The options of a method's solver, and the types that each may have."""
    solve = METHODS[method].solve
    hints = get_type_hints(solve)
    found = {}
    for parameter in inspect.signature(solve).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kinds = list(get_args(hints[parameter.name])) or [hints[parameter.name]]
            found[parameter.name] = [*kinds, int] if float in kinds else kinds
    return found


def kinds_of(types: Collection[type]) -> str:
    """Types for people: "int or null"."""
    return " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)


def _has_options_only(method: Mapping[str, Any]) -> bool:
    name = method["name"]
    known = [*options_of(name), "precision"] if isinstance(name, str) and name in METHODS else ["precision"]
    return all(key in known for key in method if key != "name")


def _has_methods_only(method: Mapping[str, Any]) -> bool:
    return all(value in METHODS if isinstance(value, str) else isinstance(value, Mapping) for value in method.values())


def read_option(text: str) -> tuple[str, bool | int | float | str]:
    """A method's option from "KEY=VALUE"; true and false are truth values."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--option {text!r}: write KEY=VALUE, such as op=sum")
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
