"""Raw files as they are found in the world, a second's work to prepare; everything in them is drawn at random."""

from pathlib import Path

import numpy as np
import polars as pl
import yaml
from chaos import Place

from embtab.datasets.criteo import CATEGORIES, INTEGERS


def criteo(place: Place, path: Path) -> None:
    """Tab-separated text, some of it blank."""
    draw, rows = np.random.default_rng(0), 60_000
    blank = {0: None}
    columns = {"label": pl.Series(draw.integers(0, 2, rows))}
    columns |= {name: pl.Series(draw.integers(0, 300, rows)).replace(blank) for name in INTEGERS}
    columns |= {name: words(draw, "c", 10 + 40 * i, rows) for i, name in enumerate(CATEGORIES)}
    pl.DataFrame(columns).write_csv(path, separator="\t", include_header=False)


def movielens(place: Place, folder: Path) -> None:
    """Pairs of ml-1m, with users and movies."""
    draw, rows, users, movies = np.random.default_rng(0), 40_000, 1500, 1000
    folder.mkdir()
    pairs = np.stack([draw.integers(1, users, rows), draw.integers(1, movies, rows)]).astype(str)
    pl.DataFrame({"userID": pairs[0], "movieID": pairs[1]}).write_parquet(folder / "ratings.parquet")
    lines = [f"{user}::{'MF'[user % 2]}::{18 + user % 5}::{user % 20}::{user:05}\n" for user in range(1, users)]
    (folder / "users.dat").write_text("".join(lines))
    lines = [f"{movie}::Movie {movie} ({1950 + movie % 30})::Drama|War\n" for movie in range(1, movies)]
    (folder / "movies.dat").write_text("".join(lines))


def table(place: Place, folder: Path) -> None:
    """A folder of CSV files, and what their columns are."""
    draw, rows = np.random.default_rng(0), 30_000
    for part in range(2):
        columns = {
            "clicked": draw.integers(0, 2, rows),
            "price": draw.random(rows),
            "city": words(draw, "city", 500, rows),
            "item": words(draw, "item", 3000, rows),
            "tags": words(draw, "a", 30, rows) + "|" + words(draw, "b", 30, rows),
            "at": np.arange(rows) + part * rows,
        }
        (folder / "files").mkdir(parents=True, exist_ok=True)
        pl.DataFrame(columns).write_csv(folder / f"files/part{part}.csv")
    roles = {"label": "clicked", "dense": {"price": None}, "categorical": ["city", "item"], "time": "at"}
    roles |= {"multi": {"tags": {"separator": "|"}}, "split": {"by": "time", "valid": 0.1, "test": 0.1}}
    (folder / "roles.yaml").write_text(yaml.safe_dump(roles))


def log(place: Place, path: Path) -> None:
    """A log of page views, the users one after the other."""
    draw, rows = np.random.default_rng(0), 20_000
    items = draw.integers(0, 800, rows)
    columns = [np.arange(rows) // 20, items, items % 30, np.full(rows, "pv"), 1_511_600_000 + np.arange(rows)]
    pl.DataFrame(columns).write_csv(path, include_header=False)


def words(draw: np.random.Generator, prefix: str, many: int, rows: int) -> pl.Series:
    """So many different words, the first ones the most frequent."""
    return prefix + pl.Series((many * draw.random(rows) ** 2).astype(int)).cast(pl.String)
