"""Every learned method, by its name. Adding one: a file here, a line below, a row in tests/learned/test_search.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from embtab.errors import UserError
from embtab.learned.dnis import DNIS
from embtab.learned.magnitude import Magnitude
from embtab.learned.method import Learned
from embtab.learned.optembed import OptEmbed
from embtab.learned.pep import PEP
from embtab.planning.specs import MethodSpec, named

LEARNED: dict[str, type[Learned]] = {
    "magnitude": Magnitude,
    "optembed": OptEmbed,
    "pep": PEP,
    "dnis": DNIS,
}


def make(method: MethodSpec) -> Learned:
    """A learned method from its name, or {"name": ..., options}.

    Raises:
        UserError: for an unknown name or option, or a value of the wrong kind.
    """
    name, options = named(method)
    if name not in LEARNED:
        raise UserError(f"unknown learned method {name!r}; there are {', '.join(LEARNED)}")
    kinds = {each.name: type(each.default) for each in dataclasses.fields(LEARNED[name])}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in kinds:
            raise UserError(f"method {name!r} has no option {option!r}; it has {', '.join(kinds) or 'none'}")
        options[option] = _read(f"{name}: {option}", value, kinds[option])
    return LEARNED[name](**options)


def _read(what: str, value: Any, kind: type) -> Any:
    """A value in the type of its option."""
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_read(what, each, float) for each in value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{what} must be {kind.__name__}, got {value!r}")
    return value
