"""Files that are well formed and say what cannot be: one field of plain data is changed, and the digests agree.

Each function draws one change with the generator it is given, so that a seed names a file.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzzing.mutations import _places, pick
from numpy.random import Generator

from embtab.errors import UserError
from embtab.reader.manifest import CONFIG, write_signed

SECONDS, BYTES = 2.0, 2**30


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 255, 256, 1.5, -0.5, 1e300, float("nan"), float("inf")),
    *(2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 10**30, -(2**31), -(2**63), 5_000_000),
    *(
        "",
        "x",
        "\n",
        "\0",
        "é",
        "../../etc/passwd",
        "/",
        ".",
        "fp32",
        "int4",
        "sum",
        "none",
        "dense",
        "hash",
        "x" * 5000,
    ),
    *([], {}, [1], [[]], {"a": 1}, [None], ["x"], [0] * 1000, ["user"] * 3000, nested(60), nested(900)),
]


def mutate(content: Any, rng: Generator) -> str:
    """Changes one value anywhere in plain data: to an odd one, one from elsewhere in it, or one close by."""
    places = list(_places(content))
    holder, key = pick(rng, places)
    value = holder[key]
    ways = ["odd", "odd", "other", "other", "lost"]
    ways += ["close"] * 3 if type(value) is int else []
    ways += ["list"] * 2 if isinstance(value, list) and value else []
    how = pick(rng, ways)
    if how == "lost":
        del holder[key]
        return f"{key!r} lost"
    if how == "odd":
        new = pick(rng, ODD)
    elif how == "other":
        at, name = pick(rng, places)
        new = at[name]
    elif how == "close":
        new = pick(rng, [value + 1, value - 1, 2 * value, value // 2, -value, value + 2**32, value * 1000])
    else:
        new = pick(rng, [value[:-1], value + value[-1:], value[::-1], value * 50])
    holder[key] = json.loads(json.dumps(new))
    return f"{key!r}: {value!r:.60} is {new!r:.60}"


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Changes config.json of a folder; its digests agree with what lies there."""
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).unlink()
    how = change(about)
    try:
        write_signed(folder, about)
    except ValueError:  # NaN, which JSON does not have
        (folder / CONFIG).write_text(json.dumps(about))
    return how


@contextmanager
def bounded(how: str, characters: int = 1500) -> Iterator[None]:
    """Holds a block to an answer or a `UserError` of one line, within two seconds of work and a gigabyte."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    started = time.process_time()
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error), how
        assert len(str(error)) < characters, f"{how}: {error}"
    except BaseException as error:
        pytest.fail(f"{how}: {error!r:.500}", pytrace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - started < SECONDS, how
