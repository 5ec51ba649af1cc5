"""MovieLens: ratings with time, or (user, movie) pairs with sampled negatives, and what is known of users and movies.

Three kinds of raw folder are told apart by their files:

- ml-100k: `u.data`, `u.user`, `u.item`. Ratings of 4 and 5 are positive, 1 and 2 negative; ratings of 3 say neither
  and are dropped, as is usual when ratings stand in for clicks (AutoInt, arXiv 1810.11921; Unified Embedding, arXiv
  2305.12102). Rows are in time order, and so are the splits.
- ml-1m as published: `ratings.dat`, `users.dat`, `movies.dat`; treated in the same way.
- ml-1m pairs: `ratings.parquet` (columns userID and movieID), `users.dat`, `movies.dat`. There is neither rating nor
  time: every pair is a positive, negatives are sampled, and the split is random. Row order is not time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embtab.datasets import vocabulary
from embtab.datasets.schema import Categorical, Dataset, describe_files
from embtab.datasets.splits import check_fractions, split_sizes, write_split
from embtab.errors import DataError, UserError, listed, shown
from embtab.files import new_folder

FEATURES = ("user", "movie", "gender", "age", "occupation", "zip", "year", "genres")
USER = "user_id"  # the raw number: in the feature `user`, all users that train does not hold are one

# layout: (name of the dataset, ratings, users, movies)
_LAYOUTS = (
    ("ml-100k", "u.data", "u.user", "u.item"),
    ("ml-1m", "ratings.dat", "users.dat", "movies.dat"),
    ("ml-1m-pairs", "ratings.parquet", "users.dat", "movies.dat"),
)
# In the order in which u.item flags them.
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def prepare(
    raw: Path,
    out: Path,
    *,
    negatives: int = 1,
    seed: int = 0,
    valid: float = 0.1,
    test: float = 0.2,
) -> Dataset:
    """Turns a raw MovieLens folder into a dataset folder.

    The features are FEATURES: int64 ids by descending count in train, id 0 for what train does not hold. `genres` is
    multi-valued with mean pooling; `year` comes from the title. The column `user_id` is the raw user number, for
    metrics grouped by user.

    With pairs, every positive is followed by its negatives and shares their split. A negative is drawn uniformly and
    independently among the movies that occur in the pairs, but in none of the user's own, whatever split those fall
    in; two negatives of one user may name the same movie.

    Args:
        raw: the folder; see the top of this file for its files.
        out: the folder to make; it must not exist, or be empty.
        negatives: drawn per positive; without effect where there are ratings.
        seed: of the split and the negatives; without effect where there are ratings.
        valid: fraction of the rows (with pairs: of the positives) that becomes the validation split.
        test: fraction that becomes the test split.

    Raises:
        UserError: for a bad option value, or an output folder that is not empty.
        DataError: for a missing or bad file, naming file, line and column. No output is left behind.
    """
    check_fractions(valid, test)
    if negatives < 1:
        raise UserError(f"negatives must be 1 or more, got {negatives}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    name, ratings_file, users_file, movies_file = _layout_of(raw)
    with new_folder(out) as folder:
        if name == "ml-1m-pairs":
            rows, sizes, source = _rows_of_pairs(ratings_file, negatives, seed, valid, test)
        else:
            rows, sizes, source = _rows_of_ratings(ratings_file, valid, test)
        read_users, read_movies = (_users_100k, _movies_100k) if name == "ml-100k" else (_users_1m, _movies_1m)
        rows = _joined(rows, USER, users_file, read_users(users_file))
        rows = _joined(rows, "movie", movies_file, read_movies(movies_file))
        return _write(folder, name, rows, sizes, {"kind": "movielens", "rows": len(rows), **source})


def _rows_of_ratings(file: Path, valid: float, test: float) -> tuple[pl.DataFrame, dict[str, int], dict[str, Any]]:
    """Columns label, user_id and movie in time order; the rows of each split; what `dataset.json` says of them."""
    ratings = _read_ratings(file)
    rows = ratings.filter(pl.col("rating") != 3).sort("time", USER, "movie", maintain_order=True)
    if rows.is_empty():
        raise DataError(f"{file}: holds no rating but 3, which says neither yes nor no")
    source = {
        "ratings": len(ratings),
        "dropped": {"rating 3": len(ratings) - len(rows)},
        "options": {"valid": valid, "test": test},
    }
    return rows.with_columns(label=pl.col("rating") > 3), split_sizes(len(rows), valid, test), source


def _rows_of_pairs(
    file: Path, negatives: int, seed: int, valid: float, test: float
) -> tuple[pl.DataFrame, dict[str, int], dict[str, Any]]:
    """The same for pairs: in random order, each positive followed by its negatives."""
    pairs = _read_pairs(file)
    positives = pairs.unique(maintain_order=True)
    rows = _shuffled_with_negatives(file, positives, negatives, np.random.default_rng(seed))
    sizes = {split: size * (1 + negatives) for split, size in split_sizes(len(positives), valid, test).items()}
    source = {
        "pairs": len(pairs),
        "dropped": {"repeated pair": len(pairs) - len(positives)},
        "options": {"negatives": negatives, "seed": seed, "valid": valid, "test": test},
    }
    return rows, sizes, source


def _write(folder: Path, name: str, rows: pl.DataFrame, sizes: dict[str, int], source: dict[str, Any]) -> Dataset:
    texts = [pl.col(USER).cast(pl.String).alias("user"), pl.col("movie").cast(pl.String), *map(pl.col, FEATURES[2:])]
    lazy = rows.lazy().select(pl.col("label").cast(pl.Float32), USER, *texts)
    train = lazy.head(sizes["train"])
    vocabularies = {feature: vocabulary.fit(train.select(feature)) for feature in FEATURES}
    vocabulary.save(vocabularies, folder)
    features = [Categorical(feature, len(vocabularies[feature])) for feature in FEATURES[:-1]]
    genres = Categorical("genres", len(vocabularies["genres"]), pooling="mean", multi=True)
    dataset = Dataset(name=name, features=(*features, genres), user=USER, source=source)
    encoded = vocabulary.encode(lazy, vocabularies).collect()
    start = 0
    for split, size in sizes.items():
        write_split(folder, split, dataset, [encoded.slice(start, size)])
        start += size
    dataset = replace(dataset, files=describe_files(folder))
    dataset.save(folder)
    return dataset


def sample_negatives(users: np.ndarray, movies: np.ndarray, negatives: int, rng: np.random.Generator) -> np.ndarray:
    """Movies that each row's user has not seen, uniform and independent.

    The r-th movie that a user has not seen is r plus the number of seen movies below it. Those are found by one
    binary search: the j-th seen movie m_j (from 0) lies below exactly when m_j - j <= r. So nothing is drawn twice.

    Args:
        users: int64 [P], user of each pair, 0..U-1.
        movies: int64 [P], movie of each pair, 0..M-1 with M - 1 among them; pairs are distinct.
        negatives: N, draws per pair; every user has a movie left to draw.
        rng: where the draws come from.

    Returns:
        int64 [P, N].
    """
    order = np.lexsort((movies, users))
    num_movies = int(movies.max()) + 1
    seen = np.bincount(users)
    first = np.cumsum(seen) - seen
    rank = np.arange(len(users)) - first[users[order]]
    unseen_below = users[order] * num_movies + movies[order] - rank
    drawn = rng.integers(0, (num_movies - seen)[users][:, None], size=(len(users), negatives))
    seen_below = np.searchsorted(unseen_below, users[:, None] * num_movies + drawn, side="right")
    unseen: np.ndarray = drawn + seen_below - first[users][:, None]
    return unseen


def _shuffled_with_negatives(file: Path, pairs: pl.DataFrame, negatives: int, rng: np.random.Generator) -> pl.DataFrame:
    """Columns user_id, movie and label; each positive is followed by its negatives."""
    catalogue, movies = np.unique(pairs["movie"].to_numpy(), return_inverse=True)
    known_users, users = np.unique(pairs[USER].to_numpy(), return_inverse=True)
    full = np.flatnonzero(np.bincount(users) == len(catalogue))
    if len(full):
        raise DataError(
            f"{file}: user {known_users[full[0]]} has all {len(catalogue)} movies, so no negative can be drawn; "
            "remove that user"
        )
    drawn = sample_negatives(users, movies, negatives, rng)
    shuffled = rng.permutation(len(users))
    groups = np.concatenate([movies[:, None], drawn], axis=1)[shuffled]
    label = np.zeros(groups.shape, dtype=bool)
    label[:, 0] = True
    user = np.repeat(known_users[users[shuffled]], 1 + negatives)
    return pl.DataFrame({USER: user, "movie": catalogue[groups.ravel()], "label": label.ravel()})


def _layout_of(raw: Path) -> tuple[str, Path, Path, Path]:
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; give the folder that holds the raw MovieLens files")
    for name, *files in _LAYOUTS:
        ratings, users, movies = (raw / file for file in files)
        if ratings.exists():
            for side in (users, movies):
                if not side.exists():
                    raise DataError(f"{side}: no such file; {name} needs it beside {ratings.name}")
            return name, ratings, users, movies
    raise DataError(f"{raw}: holds none of {', '.join(files[0] for _, *files in _LAYOUTS)}; not a MovieLens folder")


def _read_ratings(file: Path) -> pl.DataFrame:
    separator = "\t" if file.name == "u.data" else "::"
    table = _read_text(file, separator, (USER, "movie", "rating", "time"), numbers=(USER, "movie", "rating", "time"))
    _refuse(file, table, ~pl.col("rating").is_between(1, 5), "rating", "must be 1 to 5")
    return table


def _read_pairs(file: Path) -> pl.DataFrame:
    try:
        with pq.ParquetFile(file) as opened:
            table = opened.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
    if sorted(table.column_names) != ["movieID", "userID"]:
        raise DataError(f"{file}: must have the columns userID and movieID, got {listed(table.column_names)}")
    if not len(table):
        raise DataError(f"{file}: is empty; fetch it again")
    for field in table.schema:
        if not any(
            is_kind(field.type) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
        ):
            raise DataError(f"{file}: column {field.name}: must hold whole numbers, holds {field.type}")
    texts = pl.DataFrame(pl.from_arrow(table)).cast(pl.String)
    pairs = texts.cast(pl.Int64, strict=False)
    for name in pairs.columns:
        bad = pairs[name].is_null().arg_true()
        if len(bad):
            value = shown(texts[name][bad[0]])
            raise DataError(f"{file}: row {bad[0]}: column {name}: must be a whole number, got {value}")
    return pairs.select(pl.col("userID").alias(USER), pl.col("movieID").alias("movie"))


def _users_100k(file: Path) -> pl.DataFrame:
    return _read_text(file, "|", (USER, "age", "gender", "occupation", "zip"), numbers=(USER,), key=USER)


def _users_1m(file: Path) -> pl.DataFrame:
    return _read_text(file, "::", (USER, "gender", "age", "occupation", "zip"), numbers=(USER,), key=USER)


def _movies_100k(file: Path) -> pl.DataFrame:
    columns = ("movie", "title", "released", "video released", "url", *_GENRES)
    table = _read_text(file, "|", columns, numbers=("movie",), key="movie")
    for genre in _GENRES:
        _refuse(file, table, ~pl.col(genre).is_in(["0", "1"]), genre, "must be 0 or 1")
    flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _GENRES]
    return table.select("movie", _year(), pl.concat_list(flags).list.drop_nulls().alias("genres"))


def _movies_1m(file: Path) -> pl.DataFrame:
    table = _read_text(file, "::", ("movie", "title", "genres"), numbers=("movie",), key="movie")
    genres = pl.col("genres").str.split("|").list.filter(pl.element() != "")
    return table.select("movie", _year(), genres)


def _year() -> pl.Expr:
    """The last (YYYY) of the title; "" where there is none."""
    return pl.col("title").str.extract(r".*\(([0-9]{4})\)").fill_null("").alias("year")


def _read_text(
    file: Path, separator: str, columns: Sequence[str], numbers: Sequence[str], key: str | None = None
) -> pl.DataFrame:
    """A Latin-1 file of lines as strings, with `numbers` as int64 and each value of `key` only once."""
    try:
        lines = file.read_bytes().decode("latin-1").split("\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    rows = [line.removesuffix("\r").split(separator) for line in (lines if lines[-1] else lines[:-1])]
    if not rows:
        raise DataError(f"{file}: is empty; fetch it again")
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            wanted = f"{len(columns)} ({', '.join(columns[:6])}{', ...' if len(columns) > 6 else ''})"
            raise DataError(f"{file}: line {number}: has {len(row)} columns, not {wanted}")
    texts = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
    table = texts.with_columns(pl.col(list(numbers)).cast(pl.Int64, strict=False))
    for name in numbers:
        _refuse(file, texts, table[name].is_null(), name, "must be a whole number")
    if key:
        _refuse(file, texts, ~pl.col(key).is_first_distinct(), key, "must occur on one line only")
    return table


def _refuse(file: Path, table: pl.DataFrame, bad: pl.Expr | pl.Series, column: str, rule: str) -> None:
    rows = table.select(bad.alias("bad"))["bad"].arg_true()
    if len(rows):
        raise DataError(f"{file}: line {rows[0] + 1}: column {column}: {rule}, got {shown(table[column][rows[0]])}")


def _joined(rows: pl.DataFrame, key: str, file: Path, side: pl.DataFrame) -> pl.DataFrame:
    lacking = rows.join(side, on=key, how="anti")
    if len(lacking):
        raise DataError(f"{file}: has no line for {key} {lacking[key][0]}, which the ratings name")
    return rows.join(side, on=key, how="left", maintain_order="left")
