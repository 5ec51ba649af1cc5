"""Ways in which a data file goes bad: damaged bytes, nasty values in text, other columns in Parquet, altered JSON.

Each function draws one mutation with the generator it is given, so that a seed names a file.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator

BOM = b"\xef\xbb\xbf"
NASTY = [
    *("", " ", "-1", "0", "1", "2", "7", "1.0", "+1", "01", " 1", "1 ", "1_0", "0x1", "1e3", "1e400", "true", "None"),
    *("nan", "inf", "-inf", "9" * 18, "9" * 40, str(2**31), str(2**63 - 1), str(2**63), str(-(2**63))),
    *("é", "\ufeff", "\u2028", "\x00", "a\x00b", "\x0c", "\r", '"', '""', 'a"b', '"a', "'", "\\", "a b", "x" * 5000),
    *("|".join("1" * 3000), "|", "||", "1||2", "2024-01-31", "2024-01-31T10:11:12Z", "#", "//", "NULL", "$1"),
]
INT64 = np.iinfo(np.int64)


def pick(rng: Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def mutate_file(path: Path, rng: Generator) -> str:
    """Spoils a file in place, by what it holds; says how."""
    if rng.random() < 0.01:
        path.unlink()
        path.mkdir()
        return "a folder in its place"
    if path.suffix == ".gz" and rng.random() < 0.6:
        how, text = mutated_text(gzip.decompress(path.read_bytes()), rng)
        path.write_bytes(gzip.compress(text, 1, mtime=0))
        return f"{how}, packed"
    if path.suffix == ".parquet" and rng.random() < 0.6:
        return mutate_parquet(path, rng)
    way = mutated_bytes if path.suffix in (".gz", ".parquet") or rng.random() < 0.3 else mutated_text
    how, data = way(path.read_bytes(), rng)
    path.write_bytes(data)
    return how


def mutated_bytes(data: bytes, rng: Generator) -> tuple[str, bytes]:
    """Damage that knows nothing of the format."""
    at, end = sorted(int(i) for i in rng.integers(0, len(data) + 1, 2))
    flipped = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(0, len(data), int(rng.integers(1, 5)))
    flipped[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
    junk = rng.integers(0, 256, int(rng.integers(1, 40))).astype(np.uint8).tobytes()
    ways = {
        "cut short": data[:at],
        "begins late": data[at:],
        "bytes flipped": flipped.tobytes(),
        "bytes flipped at the end": data[:-1] + bytes([data[-1] ^ 0x55]),
        "a range lost": data[:at] + data[end:],
        "a range twice": data[:end] + data[at:],
        "a range of zeros": data[:at] + bytes(min(end - at, 64)) + data[at + min(end - at, 64) :],
        "junk within": data[:at] + junk + data[at:],
        "junk at the end": data + junk,
        "not UTF-8": data[:at] + b"\xff\xfe" + data[at:],
        "empty": b"",
        "a lone line feed": b"\n",
        "packed": gzip.compress(data, 1, mtime=0),
        "packed and cut short": gzip.compress(data, 1, mtime=0)[: -int(rng.integers(1, 40))],
    }
    how = pick(rng, list(ways))
    return how, ways[how]


def mutated_text(data: bytes, rng: Generator) -> tuple[str, bytes]:
    """Damage that knows lines and fields."""
    lines = data.decode("latin-1").split("\n")[:-1]
    at = int(rng.integers(len(lines)))
    ways: dict[str, Callable[[], str]] = {
        "a line twice": lambda: _joined([*lines[: at + 1], *lines[at:]]),
        "a line lost": lambda: _joined(lines[:at] + lines[at + 1 :]),
        "a blank line": lambda: _joined([*lines[:at], "", *lines[at:]]),
        "blank lines at the end": lambda: _joined([*lines, "", ""]),
        "the first line alone": lambda: _joined(lines[:1]),
        "two lines": lambda: _joined(lines[:2]),
        "line ends of Windows": lambda: "\r\n".join([*lines, ""]),
        "line ends of old": lambda: "\r".join([*lines, ""]),
        "no line feed at the end": lambda: "\n".join(lines),
        "lines in another order": lambda: _joined([lines[i] for i in rng.permutation(len(lines))]),
        "a byte order mark": lambda: BOM.decode("latin-1") + data.decode("latin-1"),
    }
    if rng.random() < 0.6:
        how, lines[at] = _mutated_line(lines[at], rng)
        return f"{how} in line {at + 1}", _joined(lines).encode("latin-1")
    how = pick(rng, list(ways))
    return how, ways[how]().encode("latin-1")


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _mutated_line(line: str, rng: Generator) -> tuple[str, str]:
    parts = re.split(r"(::|[\t,|: ])", line)  # fields stand at even places, what separates them at odd ones
    at = 2 * int(rng.integers((len(parts) + 1) // 2))
    value = pick(rng, NASTY).encode().decode("latin-1")
    if rng.random() < 0.7:
        return f"value {value[:20]!r}", "".join([*parts[:at], value, *parts[at + 1 :]])
    ways = {
        "a field lost": parts[:at] + parts[at + 2 :],
        "a field twice": [*parts[: at + 1], parts[1] if len(parts) > 1 else ",", *parts[at:]],
        "another separator": [*parts[: at + 1], pick(rng, [";", "\t", ",", " ", "|"]), *parts[at + 2 :]],
        "not UTF-8": [*parts[:at], "\xff", *parts[at:]],
    }
    how = pick(rng, list(ways))
    return how, "".join(ways[how])


def odd_columns(rows: int, rng: Generator) -> list[pa.Array]:
    """Columns of many types, some of them with values that no table of ids can hold."""
    moment = datetime(2024, 1, 31, 10, tzinfo=UTC)
    numbers = rng.integers(0, 5, rows)
    lists = [[int(j) for j in range(i % 3)] for i in range(rows)]
    some = [None if rng.random() < 0.2 else int(i) for i in numbers]
    return [
        pa.array(some, pa.int64()),
        pa.array([INT64.max if i == 3 else int(i) for i in range(rows)], pa.int64()),
        pa.array([INT64.min if i == 3 else int(i) for i in range(rows)], pa.int64()),
        pa.array([2**64 - 1 if i == 3 else int(i) for i in range(rows)], pa.uint64()),
        pa.array(numbers - 1),
        pa.array(numbers + 0.5),
        pa.array([float("nan") if i == 2 else 1.0 for i in range(rows)], pa.float32()),
        pa.array([float("inf") if i == 2 else 1e300 for i in range(rows)]),
        pa.array(numbers.astype(np.float16)),
        pa.array(numbers.astype(np.int8)),
        pa.array([str(i) for i in numbers]),
        pa.array([None if i == 1 else "é\x00" for i in range(rows)]),
        pa.array(["x" * 5000] * rows, pa.large_string()),
        pa.array(["1"] * rows, pa.string_view()),
        pa.array([b"\xff\xfe"] * rows),
        pa.array([b"\xff\xfe"] * rows).view(pa.string()),
        pa.array([b"ab"] * rows, pa.binary(2)),
        pa.array(["a", "b"] * rows).dictionary_encode()[:rows],
        pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array([7, 8, 9, 10, 11])),
        pa.array([True, False] * rows)[:rows],
        pa.nulls(rows),
        pa.nulls(rows, pa.int64()),
        pa.nulls(rows, pa.list_(pa.int64())),
        pa.array(lists, pa.list_(pa.int64())),
        pa.array(lists, pa.large_list(pa.int64())),
        pa.array(lists, pa.list_(pa.float32())),
        pa.array([[1, None]] * rows, pa.list_(pa.int64())),
        pa.array([None if i == 1 else [1] for i in range(rows)], pa.list_(pa.int64())),
        pa.array([[0] * 20_000 if i == 1 else [1] for i in range(rows)], pa.list_(pa.int64())),
        pa.array([[-1, INT64.max]] * rows, pa.list_(pa.int64())),
        pa.array([["a", ""]] * rows),
        pa.array([[[1]]] * rows),
        pa.array([[1, 2]] * rows, pa.list_(pa.int64(), 2)),
        pa.array([{"a": 1}] * rows),
        pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        pa.array([Decimal("1.5")] * rows, pa.decimal128(10, 2)),
        pa.array([Decimal("1")] * rows, pa.decimal256(60, 0)),
        *(pa.array([moment] * rows, pa.timestamp(unit, "UTC")) for unit in ("s", "ms", "us", "ns")),
        pa.array([INT64.max - 1 if i == 3 else int(i) for i in range(rows)], pa.timestamp("ms")),
        pa.array([moment.date()] * rows),
        pa.array([moment.time()] * rows),
        pa.array([5] * rows, pa.duration("s")),
    ]


def mutate_parquet(path: Path, rng: Generator) -> str:
    """Rewrites a Parquet file with other columns, rows or row groups, all of it well formed."""
    table = pq.read_table(path)
    name, other = (pick(rng, table.column_names) for _ in range(2))
    at = table.column_names.index(name)
    column = pick(rng, odd_columns(len(table), rng))
    ways: dict[str, Callable[[], pa.Table]] = {
        f"a column {name} more, of {column.type}": lambda: table.append_column(name, column),
        f"an unknown column of {column.type}": lambda: table.append_column("unknown", column),
        f"no column {name}": lambda: table.drop_columns(name),
        f"{name} is called {other}": lambda: table.rename_columns(
            [other if n == name else n for n in table.column_names]
        ),
        f"{name} with a line feed": lambda: table.rename_columns([n + "\n" * (n == name) for n in table.column_names]),
        "no rows": lambda: table.slice(0, 0),
        "no columns": lambda: table.select([]),
        "one row": lambda: table.slice(0, 1),
        "rows twice": lambda: pa.concat_tables([table, table]),
        "columns in another order": lambda: table.select(
            [table.column_names[i] for i in rng.permutation(table.num_columns)]
        ),
    }
    changed = rng.random() < 0.7
    how = f"{name} is {column.type}" if changed else pick(rng, list(ways))
    table = table.set_column(at, name, column) if changed else ways[how]()
    size = int(rng.integers(1, 12))
    pq.write_table(table, path, row_group_size=size, version=pick(rng, ["1.0", "2.6"]), store_schema=rng.random() < 0.7)
    return how


ODD_JSON: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2**40,
    10**18,
    10**30,
    "",
    "x",
    "\n",
    "/",
    [],
    {},
    [1],
    {"a": 1},
    float("nan"),
]


def mutate_json(path: Path, rng: Generator) -> str:
    """Replaces, drops or adds one value anywhere in a JSON file."""
    content = json.loads(path.read_text())
    places = list(_places(content))
    holder, key = pick(rng, places)
    if rng.random() < 0.2:
        del holder[key]
        how = f"{key!r} lost"
    elif isinstance(holder, list) and rng.random() < 0.2:
        holder.append(holder[key])
        how = f"entry {key} twice"
    elif isinstance(holder, dict) and rng.random() < 0.1:
        holder["unknown"] = pick(rng, ODD_JSON)
        how = "an unknown key"
    else:
        holder[key] = pick(rng, ODD_JSON)
        how = f"{key!r} is {holder[key]!r}"
    path.write_text(json.dumps(content, indent=1))
    return how


def _places(content: Any) -> list[tuple[Any, Any]]:
    keys = range(len(content)) if isinstance(content, list) else list(content) if isinstance(content, dict) else []
    return [place for key in keys for place in [(content, key), *_places(content[key])]]
