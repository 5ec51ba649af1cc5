"""An exported program's inputs, looked at before it runs: compiled code reads past the end of what is too short, and
may divide by a number of rows that is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from embtab.errors import UserError, shown
from embtab.reader.manifest import is_int, need

ONE_MORE = "batch + 1"
DTYPES = ("float32", "int64")


def check_described(described: Any, what: str) -> None:
    """Inside `refused`: what config.json says of inputs or outputs can be read by all that follows.

    Args:
        described: `inputs` or `outputs` of a program's config.json.
        what: which of them, for the message.
    """
    need(isinstance(described, dict) and described, f"{what} must be named")
    for name, entry in described.items():
        where = f"{what}: {shown(name)}"
        need(isinstance(entry, dict) and entry.get("dtype") in DTYPES, f"{where} has no dtype of {', '.join(DTYPES)}")
        shape, below, columns = entry.get("shape"), entry.get("below"), entry.get("features")
        sizes = shape if isinstance(shape, list) and len(shape) in (1, 2, 3) else [None]
        need(all(isinstance(n, str) or is_int(n, 0, 2**31) for n in sizes), f"{where}: shape {shown(shape)}")
        many = columns is not None
        need(not many or (isinstance(columns, list) and sizes[1:2] == [len(columns)]), f"{where}: features")
        for each in columns or ():
            need(isinstance(each, str), f"{where}: feature {shown(each)}")
        bounds = below if many and below is not None else [below]
        need(isinstance(bounds, list) and (not many or below is None or len(bounds) == len(columns)), f"{where}: below")
        for each in bounds:
            need(each is None or is_int(each, 1, 2**63), f"{where}: below {shown(each)}")


def check(taken: Mapping[str, Mapping[str, Any]], given: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Looks at names, types and shapes.

    Args:
        taken: `inputs` of a program's config.json: of each its dtype, and its shape, in which lengths that may differ
            from call to call are words, the same word for the same length; `ONE_MORE` is one more than "batch".
        given: arrays by name; others may be among them.

    Returns:
        the lengths by their words.

    Raises:
        UserError: when an input is missing, or is not of its type or shape.
    """
    lengths: dict[str, tuple[int, str]] = {}
    for name, entry in taken.items():
        if name not in given:
            raise UserError(f"input {name!r} is missing; the program takes {', '.join(taken)}")
        array, shape = given[name], entry["shape"]
        asked = f"input {name!r} must be {entry['dtype']} {_words(shape)}"
        if str(array.dtype) != entry["dtype"] or array.ndim != len(shape):
            raise UserError(f"{asked}, and is {array.dtype} {_words(array.shape)}")
        for length, size in zip(shape, array.shape, strict=True):
            if isinstance(length, int):
                if length != size:
                    raise UserError(f"{asked}, and is {_words(array.shape)}")
                continue
            word, length = ("batch", size - 1) if length == ONE_MORE else (length, size)
            known, first = lengths.setdefault(word, (length, name))
            if known != length:
                raise UserError(f"{asked}, and is {_words(array.shape)}: {word} is {known} by input {first!r}")
    return {word: length for word, (length, _) in lengths.items()}


def check_bags(taken: Iterable[str], given: Mapping[str, np.ndarray]) -> None:
    """Makes sure that offsets rise from 0 to the number of their feature's ids, as `Bundle.lookup` does.

    Args:
        taken: the names of a program's inputs.
        given: arrays that `check` has seen.

    Raises:
        UserError: when they do not.
    """
    for name in taken:
        feature = name.removeprefix("offsets.")
        ids = given.get(f"ids.{feature}")
        if feature == name or ids is None:
            continue
        offsets = given[name]
        if not len(offsets) or offsets[0] or offsets[-1] != len(ids) or (offsets[1:] < offsets[:-1]).any():
            raise UserError(f"input {name!r} must rise from 0 to the {len(ids)} ids of feature {feature!r}")


def empty(made: Mapping[str, Mapping[str, Any]], lengths: Mapping[str, int]) -> dict[str, np.ndarray] | None:
    """What a program must give where it is asked nothing; None where an output has numbers.

    Args:
        made: `outputs` of a program's config.json.
        lengths: as `check` returns them.
    """
    if 0 not in lengths.values():
        return None
    shapes = {name: [lengths.get(length, length) for length in entry["shape"]] for name, entry in made.items()}
    if not all(0 in shape for shape in shapes.values()):
        return None
    return {name: np.zeros(shape, made[name]["dtype"]) for name, shape in shapes.items()}


def check_ids(taken: Mapping[str, Mapping[str, Any]], given: Mapping[str, np.ndarray]) -> None:
    """Looks for what a program has stumbled over; it need not be asked before.

    Args:
        taken: as of `check`; of ids also `below`, the number of a feature's ids, null where any int64 is one. Stacked
            ids have a list of these, and one of their `features`.
        given: arrays that `check` has seen.

    Raises:
        UserError: when an id is out of range.
    """
    for name, entry in taken.items():
        if "features" in entry:
            columns = zip(entry["features"], entry.get("below", ()), given[name].T, strict=False)
        else:
            columns = zip([name.removeprefix("ids.")], [entry.get("below")], [given[name]], strict=True)
        for feature, below, ids in columns:
            if below is not None and ((ids < 0) | (ids >= below)).any():
                wrong = ids[(ids < 0) | (ids >= below)][0]
                raise UserError(f"feature {feature!r}: id {wrong} is outside [0, {below})")


def _words(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"
