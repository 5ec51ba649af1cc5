"""Behaviour logs of every format, with the events of each user in time order."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fuzzing.films import write_100k
from fuzzing.raw import Kind, Row, cells, equal, lines_of_any_end, prepared, text_of
from numpy.random import Generator


@dataclass
class Log:
    """Items of each user in order, users in the order of their numbers; categories of items, attributes of users."""

    events: dict[str, list[str]]
    categories: dict[str, str] | None = None
    sides: dict[str, Row] | None = None


def some_events(rng: Generator) -> list[tuple[str, str, int]]:
    found = []
    for user in range(8):
        items = rng.permutation(30)[: int(rng.integers(3, 9))]
        found += [(f"{user}", f"{item}", 1000 + int(rng.integers(200))) for item in items]
    return [found[i] for i in rng.permutation(len(found))]


def in_order(events: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(events, key=lambda event: (event[0].encode(), event[2])):
        found.setdefault(user, []).append(item)
    return found


def write_s3rec(folder: Path, rng: Generator) -> None:
    lines = [f"{user} {' '.join(items)}\n" for user, items in in_order(some_events(rng)).items()]
    (folder / "toy.txt").write_text("".join(lines))
    attributes = {str(item): [f"c{item % 4}", "x"] if item % 5 else [] for item in range(30)}
    (folder / "toy_item2attributes.json").write_text(json.dumps(attributes, indent=0))
    if rng.random() < 0.3:
        (folder / "toy_sample.txt").write_text("".join(f"{line.split()[0]} n0 n1\n" for line in lines))


def read_s3rec(folder: Path) -> Log:
    lines = [line.split() for line in lines_of_any_end(folder / "toy.txt")]
    if len({user for user, *_ in lines}) < len(lines):
        raise ValueError("a user twice")
    attributes = json.loads((folder / "toy_item2attributes.json").read_text("utf-8"))
    categories = {item: str(values[0]) if values else "" for item, values in attributes.items()}
    return Log({user: items for user, *items in lines}, categories)


def write_events_100k(folder: Path, rng: Generator) -> None:
    write_100k(folder, rng)
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t3\t{t}\n" for u, i, t in some_events(rng)))


def read_events_100k(folder: Path) -> Log:
    def rows(name: str, separator: str, count: int, encoding: str = "utf-8-sig") -> list[list[str]]:
        return [cells(line, separator, count) for line in lines_of_any_end(folder / name, encoding)]

    events = in_order([(user, item, int(time)) for user, item, _, time in rows("u.data", "\t", 4)])
    people, films = rows("u.user", "|", 5), rows("u.item", "|", 24, "latin-1")
    for lines in (people, films):
        if len({key for key, *_ in lines}) < len(lines):
            raise ValueError("a user or an item twice")
    categories = {item: "".join(flags) for item, _, _, _, _, *flags in films}
    sides = {user: {"age": age, "gender": gender, "occupation": job} for user, age, gender, job, _ in people}
    blank = {"age": "", "gender": "", "occupation": ""}
    return Log(events, categories, {user: sides.get(user, blank) for user in events})


def write_taobao(folder: Path, rng: Generator) -> None:
    lines = [f"{u},{i},c{int(i) % 4},{'buy' if rng.random() < 0.1 else 'pv'},{t}\n" for u, i, t in some_events(rng)]
    (folder / "UserBehavior.csv").write_text("".join(lines))


def read_taobao(folder: Path) -> Log:
    rows = [row for row in csv.reader(io.StringIO(text_of(folder / "UserBehavior.csv"), newline="")) if row]
    if any(len(row) != 5 for row in rows):
        raise ValueError("rows of other lengths")
    views = [row for row in rows if row[3] == "pv"]
    categories: dict[str, str] = {}
    for _, item, category, _, _ in views:
        categories.setdefault(item, category)
    return Log(in_order([(user, item, int(time)) for user, item, _, _, time in views]), categories)


def write_amazon(folder: Path, rng: Generator) -> None:
    reviews = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "text": "so so"} for u, i, t in some_events(rng)]
    (folder / "reviews.json").write_text("".join(json.dumps(review) + "\n" for review in reviews))


def read_amazon(folder: Path) -> Log:
    events = []
    for line in lines_of_any_end(folder / "reviews.json"):
        review = json.loads(line)
        names = ("reviewerID" if "reviewerID" in review else "user_id", "asin")
        time = review["unixReviewTime"] if "unixReviewTime" in review else review["timestamp"]
        if not all(type(review[name]) in (str, int) for name in names) or (isinstance(time, float) and time % 1):
            raise ValueError("no names, or no whole time")
        events.append((str(review[names[0]]), str(review["asin"]), int(time)))
    return Log(in_order(events))


def verify_log(read: Callable[[Path], Log], folder: Path, out: Path) -> None:
    """Of leave-one-out: the history and the target of each user, in every split."""
    log = read(folder)
    users = [user for user, items in log.events.items() if len(items) >= 3]
    known = {item for user in users for item in log.events[user][:-2]}
    categories = log.categories or {}
    kinds = {categories.get(item, "") for item in known}

    def kind_of(item: str) -> str | None:
        return categories.get(item, "") if categories.get(item, "") in kinds else None

    for split, places in (("train", range(1, 1000)), ("valid", [-2]), ("test", [-1])):
        rows = [row for row in prepared(out, split) if row["label"]] if (out / split).exists() else []
        wanted = []
        for number, user in enumerate(users):
            items = log.events[user]
            for at in range(1, len(items) - 2) if split == "train" else [len(items) + place for place in places]:
                row: Row = {"user_id": number, "item": items[at] if items[at] in known else None}
                row["history_item"] = [item if item in known else None for item in items[:at]]
                if log.categories is not None:
                    row |= {"category": kind_of(items[at]), "history_category": [kind_of(i) for i in items[:at]]}
                if split == "train":
                    row |= {"user": user} | (log.sides[user] if log.sides else {})
                wanted.append(row)
        equal([{name: row[name] for name in other} for row, other in zip(rows, wanted, strict=True)], wanted)


COMMAND = ("sequences", "--max-history", "50", "--targets", "50", "--eval-negatives", "3")
KINDS = [
    Kind(f"sequences of {name}", write, COMMAND, partial(verify_log, read), raw)
    for name, write, read, raw in (
        ("s3rec", write_s3rec, read_s3rec, "toy.txt"),
        ("ml-100k", write_events_100k, read_events_100k, ""),
        ("taobao", write_taobao, read_taobao, "UserBehavior.csv"),
        ("amazon", write_amazon, read_amazon, "reviews.json"),
    )
]
