"""Criteo and Avazu logs, and tables of CSV and Parquet: rows in the order of the files."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fuzzing.raw import ROWS, SHARES, Kind, Row, cells, equal, lines_of, prepared, text_of
from numpy.random import Generator

INTEGERS = [f"I{i}" for i in range(1, 14)]
HASHES = [f"C{i}" for i in range(1, 27)]


def write_criteo(folder: Path, rng: Generator) -> None:
    lines = []
    for _ in range(ROWS):
        integers = ["" if rng.random() < 0.2 else str(rng.integers(-3, 500)) for _ in INTEGERS]
        hashes = ["" if rng.random() < 0.1 else f"{rng.integers(9):08x}" for _ in HASHES]
        lines.append("\t".join([str(rng.integers(2)), *integers, *hashes]) + "\n")
    text = "".join(lines).encode()
    name = "day_0.gz" if rng.random() < 0.3 else "day_0.txt"
    (folder / name).write_bytes(gzip.compress(text, 1, mtime=0) if name.endswith("gz") else text)


def verify_criteo(folder: Path, out: Path) -> None:
    wanted = []
    for line in lines_of(text_of(next(folder.iterdir()))):
        label, *others = cells(line, "\t", 40)
        row: Row = {"label": float(int(label))}
        row |= {name: float(np.float32(int(x or 0))) for name, x in zip(INTEGERS, others[:13], strict=True)}
        wanted.append(row | dict(zip(HASHES, others[13:], strict=True)))
    equal(prepared(out), wanted)


ROLES = {
    "label": "y",
    "dense": {"x": {"transform": "none", "fill": -1}},
    "categorical": {"c": None, "n": {"raw": True, "num_ids": 50}},
    "multi": {"m": {"separator": "|"}},
    "history": {"h": {"of": "c", "separator": "|", "max_length": 4}},
    "user": "u",
    "time": {"column": "t", "unit": "s", "derive": "hour"},
    "split": {"by": "order", "valid": 0.0, "test": 0.0},
    "min_count": 1,
}
SCHEMA = pa.schema(
    {
        **{"y": pa.int64(), "x": pa.float64(), "c": pa.string(), "n": pa.int64(), "m": pa.list_(pa.string())},
        **{"h": pa.list_(pa.string()), "u": pa.string(), "t": pa.int64(), "unread": pa.string()},
    }
)


def table_rows(rng: Generator) -> list[Row]:
    def some(most: int) -> list[str]:
        return [f"v{i}" for i in rng.integers(0, 6, int(rng.integers(most)))]

    return [
        {"y": int(rng.integers(2)), "x": float(rng.integers(-8, 9)) / 4, "c": f"v{rng.integers(6)}"}
        | {"n": int(rng.integers(50)), "m": some(4), "h": some(7), "u": f"u{rng.integers(5)}"}
        | {"t": 1_700_000_000 + 1800 * i, "unread": "w"}
        for i in range(ROWS)
    ]


def write_roles(folder: Path) -> None:
    (folder.parent / "roles.yaml").write_text(yaml.safe_dump(ROLES, sort_keys=False))


def write_csv(folder: Path, rng: Generator) -> None:
    write_roles(folder)
    rows = table_rows(rng)
    for number, part in enumerate((rows[:25], rows[25:])):
        text = io.StringIO()
        writer = csv.DictWriter(text, SCHEMA.names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"m": "|".join(row["m"]), "h": "|".join(row["h"])} for row in part)
        packed = rng.random() < 0.2
        data = text.getvalue().encode()
        name = f"part-{number}.csv" + ".gz" * packed
        (folder / name).write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)


def write_parquet(folder: Path, rng: Generator) -> None:
    write_roles(folder)
    rows = table_rows(rng)
    for number, part in enumerate((rows[:25], rows[25:])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), folder / f"part-{number}.parquet", row_group_size=10)


def csv_rows(file: Path) -> list[Row]:
    header, *rows = [row for row in csv.reader(io.StringIO(text_of(file, errors="surrogateescape"), newline="")) if row]
    if len(set(header)) < len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError("a column twice, or rows of other lengths")
    return [dict(zip(header, row, strict=True)) for row in rows]


def number_of(value: Any) -> float:
    return float({"true": 1, "false": 0}.get(str(value).strip().lower(), value))


def text_or_blank(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def listed(value: Any) -> list[str]:
    values = value.split("|") if value and isinstance(value, str) else value or []
    return [text_or_blank(each) for each in values]


def hour_of(value: Any) -> int:
    if isinstance(value, datetime):
        return value.astimezone(UTC).hour if value.tzinfo else value.hour
    if isinstance(value, date):
        return 0
    if isinstance(value, str) and "-" in value[1:]:
        moment = datetime.fromisoformat(value.strip())
        return moment.astimezone(UTC).hour if moment.tzinfo else moment.hour
    return int(float(value)) // 3600 % 24


def table_row(raw: Row) -> Row:
    x = raw["x"]
    if (isinstance(x, str) and not x.strip()) or x is None or np.isnan(number_of(x)):
        x = -1.0
    label = number_of(raw["y"])
    if label not in (0.0, 1.0):
        raise ValueError("label")
    number = int(raw["n"])
    if not 0 <= number < 50:
        raise ValueError("beyond num_ids")
    return {
        "y": label,
        "x": float(np.float32(number_of(x))),
        "c": text_or_blank(raw["c"]),
        "n": number,
        "m": [value for value in listed(raw["m"]) if value],
        "h": listed(raw["h"])[-4:],
        "u": text_or_blank(raw["u"]),
        "t_hour": hour_of(raw["t"]),
    }


def verify_table(folder: Path, out: Path, read: Callable[[Path], list[Row]]) -> None:
    wanted = [table_row(row) for file in sorted(folder.iterdir()) if file.is_file() for row in read(file)]
    repr(wanted).encode()  # not what could not be decoded
    users = Counter(row["u"] for row in wanted)
    numbers = {user: i for i, user in enumerate(sorted(users, key=lambda user: (-users[user], user.encode())), 1)}
    for row in wanted:
        row["u"] = numbers[row["u"]]
    equal(prepared(out), wanted)


def verify_csv(folder: Path, out: Path) -> None:
    verify_table(folder, out, csv_rows)


def verify_parquet(folder: Path, out: Path) -> None:
    wanted = [name for name in SCHEMA.names if name != "unread"]
    verify_table(folder, out, lambda file: pq.ParquetFile(file).read(wanted).to_pylist())


AVAZU = ["C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"]
AVAZU += [
    "device_id",
    "device_ip",
    "device_model",
    "device_type",
    "device_conn_type",
    *(f"C{i}" for i in range(14, 22)),
]


def write_avazu(folder: Path, rng: Generator) -> None:
    lines = [",".join(["id", "click", "hour", *AVAZU]) + "\n"]
    for i in range(ROWS):
        hour = (datetime(2014, 10, 21) + timedelta(hours=i // 4)).strftime("%y%m%d%H")
        lines.append(",".join([str(i), str(rng.integers(2)), hour, *(f"{rng.integers(6):04x}" for _ in AVAZU)]) + "\n")
    (folder / "train.csv").write_text("".join(lines))


def verify_avazu(folder: Path, out: Path) -> None:
    wanted = []
    for row in csv_rows(folder / "train.csv"):
        moment = datetime.strptime(row["hour"], "%y%m%d%H")
        label = {"click": number_of(row["click"])}
        named = {name: row[name] for name in AVAZU}
        wanted.append(label | named | {"hour_hour": moment.hour, "hour_weekday": moment.weekday()})
    equal(prepared(out), wanted)


KINDS = [
    Kind("criteo", write_criteo, ("criteo", *SHARES, "--min-count", "1", "--dense-transform", "none"), verify_criteo),
    Kind("avazu", write_avazu, ("avazu", *SHARES, "--min-count", "1"), verify_avazu),
    Kind("table of CSV", write_csv, ("table",), verify_csv),
    Kind("table of Parquet", write_parquet, ("table",), verify_parquet),
]
