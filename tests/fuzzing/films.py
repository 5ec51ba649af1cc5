"""MovieLens in its three layouts, and Frappe."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing.raw import ROWS, SHARES, Kind, Row, cells, equal, lines_of, lines_of_any_end, prepared, text_of
from numpy.random import Generator

GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
PEOPLE, FILMS = range(1, 9), range(1, 21)


def some_ratings(rng: Generator) -> list[tuple[int, int, int, int]]:
    pairs = rng.permutation([(u, m) for u in PEOPLE for m in FILMS])[:60]
    return [(int(u), int(m), int(rng.integers(1, 6)), 880_000_000 + int(rng.integers(30))) for u, m in pairs]


def write_100k(folder: Path, rng: Generator) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in some_ratings(rng)))
    users = [f"{u}|{20 + u}|{'MF'[u % 2]}|job{u % 3}|{u:05}\n" for u in PEOPLE]
    (folder / "u.user").write_text("".join(users))
    flags = ["|".join(str(int(rng.random() < 0.2)) for _ in GENRES) for _ in FILMS]
    films = [f"{m}|Film {m} ({1950 + m})|01-Jan-1995||http:x|{flags[m - 1]}\n" for m in FILMS]
    (folder / "u.item").write_text("".join(films), encoding="latin-1")


def write_1m_sides(folder: Path, rng: Generator) -> None:
    users = [f"{u}::{'MF'[u % 2]}::{20 + u}::job{u % 3}::{u:05}\n" for u in PEOPLE]
    (folder / "users.dat").write_text("".join(users))
    films = [f"{m}::Film {m} ({1950 + m})::{'|'.join(rng.permutation(GENRES)[: m % 3])}\n" for m in FILMS]
    (folder / "movies.dat").write_text("".join(films), encoding="latin-1")


def write_1m(folder: Path, rng: Generator) -> None:
    write_1m_sides(folder, rng)
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in some_ratings(rng)))


def write_pairs(folder: Path, rng: Generator) -> None:
    write_1m_sides(folder, rng)
    users, films, _, _ = zip(*some_ratings(rng), strict=True)
    pairs = pa.table({"userID": [str(u) for u in users], "movieID": [str(m) for m in films]})
    pq.write_table(pairs, folder / "ratings.parquet", row_group_size=20)


def sides_of(folder: Path) -> tuple[dict[int, Row], dict[int, Row]]:
    """What is known of users and movies."""
    old = (folder / "u.item").exists()
    users, films = {}, {}
    for line in lines_of(text_of(folder / ("u.user" if old else "users.dat"), "latin-1")):
        user, one, other, job, code = cells(line, "|" if old else "::", 5)
        age, gender = (one, other) if old else (other, one)
        users[int(user)] = {"user": str(int(user)), "gender": gender, "age": age, "occupation": job, "zip": code}
    for line in lines_of(text_of(folder / ("u.item" if old else "movies.dat"), "latin-1")):
        if old:
            film, title, _, _, _, *flags = cells(line, "|", 24)
            genres = [genre for genre, flag in zip(GENRES, flags, strict=True) if int(flag)]
        else:
            film, title, listed_genres = cells(line, "::", 3)
            genres = [genre for genre in listed_genres.split("|") if genre]
        years = re.findall(r"\(([0-9]{4})\)", title)
        films[int(film)] = {"movie": str(int(film)), "year": years[-1] if years else "", "genres": genres}
    return users, films


def verify_ratings(folder: Path, out: Path) -> None:
    users, films = sides_of(folder)
    old = (folder / "u.data").exists()
    text = text_of(folder / ("u.data" if old else "ratings.dat"), "latin-1")
    ratings = [tuple(map(int, cells(line, "\t" if old else "::", 4))) for line in lines_of(text)]
    wanted = [
        {"label": float(rating > 3), "user_id": user, **users[user], **films[film]}
        for user, film, rating, _ in sorted(ratings, key=lambda row: (row[3], row[0], row[1]))
        if rating != 3
    ]
    equal(prepared(out), wanted)


def verify_pairs(folder: Path, out: Path) -> None:
    users, films = sides_of(folder)
    raw = pq.read_table(folder / "ratings.parquet").to_pylist()
    pairs = {(int(row["userID"]), int(row["movieID"])) for row in raw}
    rows = prepared(out)
    found = [(row["user_id"], int(row["movie"])) for row in rows]
    equal(
        rows,
        [{"label": r["label"], "user_id": u, **users[u], **films[m]} for r, (u, m) in zip(rows, found, strict=True)],
    )
    assert sorted(pair for row, pair in zip(rows, found, strict=True) if row["label"]) == sorted(pairs)
    assert not {pair for row, pair in zip(rows, found, strict=True) if not row["label"]} & pairs


FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]


def write_frappe(folder: Path, rng: Generator) -> None:
    for split, count in (("train", ROWS), ("valid", 10), ("test", 10)):
        lines = [
            f"{rng.integers(2)} " + " ".join(f"{10 * i + rng.integers(10)}:1" for i in range(10)) + "\n"
            for _ in range(count)
        ]
        (folder / f"{split}.libsvm").write_text("".join(lines))


def verify_frappe(folder: Path, out: Path) -> None:
    splits = {}
    for split in ("train", "valid", "test"):
        rows = []
        for line in lines_of_any_end(folder / f"{split}.libsvm"):
            label, *fields = cells(line, None, 11)
            indices = [int(re.fullmatch(r"([0-9]+):1", field)[1]) for field in fields]  # type: ignore[index]
            rows.append({"label": {"1": 1.0, "0": 0.0, "-1": 0.0}[label], **dict(zip(FIELDS, indices, strict=True))})
        splits[split] = rows
    known = {name: {row[name] for row in splits["train"]} for name in FIELDS}
    for split, rows in splits.items():
        wanted = [
            {"label": row["label"], "user_id": row["user"]}
            | {name: str(row[name]) if row[name] in known[name] else None for name in FIELDS}
            for row in rows
        ]
        equal(prepared(out, split), wanted)


KINDS = [
    Kind("ml-100k", write_100k, ("movielens", *SHARES), verify_ratings),
    Kind("ml-1m", write_1m, ("movielens", *SHARES), verify_ratings),
    Kind("ml-1m pairs", write_pairs, ("movielens", *SHARES), verify_pairs),
    Kind("frappe", write_frappe, ("frappe",), verify_frappe),
]
