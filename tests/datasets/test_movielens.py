import random
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embtab.datasets import movielens
from embtab.datasets.schema import Dataset
from embtab.errors import DataError, UserError
from embtab.features import read_features

# The order of the flags in u.item, written out independently of the package.
GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
USERS = {
    u: {"gender": "MF"[u % 2], "age": str(18 + u % 5), "occupation": f"job{u % 3}", "zip": f"{u:05}"}
    for u in range(1, 21)
}
TITLES = {7: "unknown", 8: "Café (Le) (1987) (V)", 9: "2001: A (2001) Story (1968) "}
MOVIES = {
    m: {
        "title": TITLES.get(m, f"Movie {m} ({1950 + m % 30})"),
        "genres": [GENRES[m % 19], GENRES[(m + 5) % 19]] if m % 4 else [],
    }
    for m in range(1, 41)
}
YEARS = {m: str(1950 + m % 30) for m in MOVIES} | {7: "", 8: "1987", 9: "1968"}


def ratings_100k(rows: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    rng = random.Random(seed)
    pairs = rng.sample([(u, m) for u in USERS for m in MOVIES], rows)
    return [(u, m, rng.randint(1, 5), 880_000_000 + rng.randrange(rows // 2)) for u, m in pairs]


def write_100k(folder: Path, ratings: list[tuple[int, int, int, int]]) -> Path:
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))
    users = [f"{u}|{f['age']}|{f['gender']}|{f['occupation']}|{f['zip']}\n" for u, f in USERS.items()]
    (folder / "u.user").write_text("".join(users))
    items = []
    for m, movie in MOVIES.items():
        flags = "|".join(str(int(genre in movie["genres"])) for genre in GENRES)
        items.append(f"{m}|{movie['title']}|01-Jan-1995||http://x|{flags}\n")
    (folder / "u.item").write_text("".join(items), encoding="latin-1")
    return folder


def write_1m(folder: Path, pairs: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    users, movies = zip(*pairs, strict=True)
    table = pl.DataFrame({"userID": list(map(str, users)), "movieID": list(map(str, movies))})
    table.write_parquet(folder / "ratings.parquet")
    lines = [f"{u}::{f['gender']}::{f['age']}::{f['occupation']}::{f['zip']}\n" for u, f in USERS.items()]
    (folder / "users.dat").write_text("".join(lines))
    lines = [f"{m}::{movie['title']}::{'|'.join(movie['genres'])}\n" for m, movie in MOVIES.items()]
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    return folder


def some_pairs(rows: int = 300) -> list[tuple[int, int]]:
    pairs = [(u, m) for u in USERS for m in MOVIES if m <= 35]
    return random.Random(3).sample(pairs, rows)


def decoded(out: Path, split: str) -> list[dict]:
    """Rows with the ids turned back into raw values through the vocabularies; None for id 0."""
    values = {f.stem: pq.read_table(f)["value"].to_pylist() for f in (out / "vocab").iterdir()}
    rows = pq.read_table(out / split).to_pylist()
    for row in rows:
        for name, known in values.items():
            row[name] = [known[i] for i in row[name]] if name == "genres" else known[row[name]]
    return rows


def fields_of(user: int, movie: int) -> dict:
    return {"user": str(user), "movie": str(movie), **USERS[user], "year": YEARS[movie], "genres": movie}


def assert_vocabularies(out: Path, train: list[dict]) -> None:
    """Counts and order by Counter, from the raw values of the training rows."""
    for name in movielens.FEATURES:
        counts = Counter(v for row in train for v in (row[name] if name == "genres" else [row[name]]))
        found = pq.read_table(out / "vocab" / f"{name}.parquet").to_pydict()
        ordered = sorted(counts, key=lambda v: (-counts[v], v))
        assert found["value"] == [None, *ordered], name
        assert found["count"] == [0, *(counts[v] for v in ordered)], name


def test_ratings_become_labels_in_time_order(tmp_path):
    ratings = ratings_100k(500)
    out = tmp_path / "out"
    dataset = movielens.prepare(write_100k(tmp_path / "raw", ratings), out, valid=0.2, test=0.3)
    ordered = sorted((r for r in ratings if r[2] != 3), key=lambda r: (r[3], r[0], r[1]))
    n = len(ordered)
    num_valid, num_test = round(n * 0.2), round(n * 0.3)
    cuts = {"train": (0, n - num_valid - num_test), "valid": (n - num_valid - num_test, n - num_test)}
    cuts["test"] = (n - num_test, n)
    train = []
    for split, (start, stop) in cuts.items():
        raw = [
            {
                "label": float(rating >= 4),
                "user_id": user,
                **fields_of(user, movie),
                "genres": sorted(MOVIES[movie]["genres"], key=GENRES.index),
            }
            for user, movie, rating, _ in ordered[start:stop]
        ]
        train = train or raw
        known = {name: {row[name] for row in train} for name in movielens.FEATURES[:-1]}
        known_genres = {genre for row in train for genre in row["genres"]}
        for row in raw:
            row |= {name: row[name] if row[name] in seen else None for name, seen in known.items()}
            row["genres"] = [genre if genre in known_genres else None for genre in row["genres"]]
        assert decoded(out, split) == raw, split
    assert_vocabularies(out, train)
    assert dataset.source["dropped"] == {"rating 3": 500 - n}
    assert Dataset.load(out) == dataset
    assert dataset.name == "ml-100k"


def test_an_unseen_user_is_id_0_but_keeps_a_number(tmp_path):
    ratings = [(1 + i // 50, 1 + i % 40, 4 + i % 2, 1000 + i) for i in range(100)]
    ratings = [r for i, r in enumerate(ratings) if i < 40 or 50 <= i < 90]  # user 2 only in the second half
    movielens.prepare(write_100k(tmp_path / "raw", ratings), tmp_path / "out", valid=0.25, test=0.25)
    test = pq.read_table(tmp_path / "out" / "test").to_pydict()
    assert set(test["user"]) == {0}
    assert set(test["user_id"]) == {2}


def test_published_ml_1m_is_read_like_ml_100k(tmp_path):
    """The same ratings in both formats give the same rows."""
    ratings = ratings_100k(300)
    write_100k(tmp_path / "a", ratings)
    write_1m(tmp_path / "b", [(1, 1)])
    (tmp_path / "b" / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
    movielens.prepare(tmp_path / "a", tmp_path / "out_a")
    dataset = movielens.prepare(tmp_path / "b", tmp_path / "out_b")
    assert dataset.name == "ml-1m"
    for split in ("train", "valid", "test"):
        a, b = decoded(tmp_path / "out_a", split), decoded(tmp_path / "out_b", split)
        for row in (*a, *b):
            row["genres"].sort(key=str)
        assert a == b


@pytest.mark.parametrize("negatives", [1, 3])
def test_pairs_get_negatives_nobody_has_seen(tmp_path, negatives):
    pairs = some_pairs()
    out = tmp_path / "out"
    raw = write_1m(tmp_path / "raw", [*pairs, pairs[5]])
    dataset = movielens.prepare(raw, out, negatives=negatives, seed=1)
    assert dataset.source["dropped"] == {"repeated pair": 1}
    sizes = {"train": 210, "valid": 30, "test": 60}
    positives = []
    for split, size in sizes.items():
        rows = pq.read_table(out / split).to_pydict()
        assert dataset.rows(split) == size * (1 + negatives)
        assert rows["label"] == [1.0, *([0.0] * negatives)] * size
        raw_rows = decoded(out, split)
        for row in raw_rows:
            user, movie = row["user_id"], row["movie"]
            if movie is None or None in (row["zip"], row["year"]):
                continue  # a value that train does not hold
            expected = fields_of(user, int(movie)) | {"genres": MOVIES[int(movie)]["genres"]}
            shown = [expected["genres"][i] if g is not None else None for i, g in enumerate(row["genres"])]
            assert row == {"label": row["label"], "user_id": user, **expected, "genres": shown}
            assert ((user, int(movie)) in pairs) == (row["label"] == 1)
            assert int(movie) <= 35  # movies of no pair are never drawn
        positives += [(row["user_id"], int(row["movie"] or 0)) for row in raw_rows if row["label"] == 1]
        if split == "train":
            assert_vocabularies(out, raw_rows)
            assert all(None not in row.values() for row in raw_rows)
        for i in range(0, len(raw_rows), 1 + negatives):
            assert len({row["user_id"] for row in raw_rows[i : i + 1 + negatives]}) == 1
    assert len(positives) == 300
    assert len(set(positives) - set(pairs)) <= sum(movie == 0 for _, movie in positives)
    assert positives != pairs


def test_the_seed_decides_split_and_negatives(tmp_path):
    raw = write_1m(tmp_path / "raw", some_pairs())
    same = [movielens.prepare(raw, tmp_path / name, seed=4) for name in ("a", "b")]
    other = movielens.prepare(raw, tmp_path / "c", seed=5)
    assert same[0].fingerprint == same[1].fingerprint != other.fingerprint


@given(st.data())
def test_sampled_negatives_are_unseen(data):
    num_movies = data.draw(st.integers(2, 30))
    seen = data.draw(
        st.lists(st.sets(st.integers(0, num_movies - 1), min_size=1, max_size=num_movies - 1), min_size=1, max_size=8)
    )
    seen[0] = {num_movies - 1}
    pairs = [(u, m) for u, movies in enumerate(seen) for m in movies]
    data.draw(st.randoms()).shuffle(pairs)
    users, movies = np.array(pairs).T
    drawn = movielens.sample_negatives(users, movies, 5, np.random.default_rng(len(pairs)))
    assert drawn.shape == (len(pairs), 5)
    assert all(0 <= m < num_movies and m not in seen[u] for u, row in zip(users, drawn, strict=True) for m in row)


def test_sampled_negatives_are_uniform_over_what_is_unseen():
    users = np.array([0, 1, 0, 1, 1, 2])
    movies = np.array([3, 0, 0, 4, 5, 5])
    drawn = movielens.sample_negatives(users, movies, 60_000, np.random.default_rng(0))
    for user, unseen in enumerate(([1, 2, 4, 5], [1, 2, 3], [0, 1, 2, 3, 4])):
        counts = Counter(drawn[users == user].ravel().tolist())
        assert sorted(counts) == unseen
        total = sum(counts.values())
        for count in counts.values():  # five standard deviations of a binomial
            p = 1 / len(unseen)
            assert abs(count - total * p) < 5 * (total * p * (1 - p)) ** 0.5


def test_features_are_described(tmp_path):
    movielens.prepare(write_1m(tmp_path / "raw", some_pairs()), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    features = read_features(tmp_path / "out")
    assert [f.name for f in features] == list(movielens.FEATURES)
    assert [f.pooling for f in features] == ["sum"] * 7 + ["mean"]
    assert [f.multi for f in dataset.features] == [False] * 7 + [True]
    assert dataset.user == "user_id"


def edit(file: Path, line: int, text: str) -> None:
    lines = file.read_text(encoding="latin-1").split("\n")
    lines[line - 1] = text
    file.write_text("\n".join(lines), encoding="latin-1")


def assert_refused(raw: Path, message: str) -> None:
    out = raw.parent / "made" / "out"
    with pytest.raises(DataError) as caught:
        movielens.prepare(raw, out)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


FLAGS = "|".join("0" * 19)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("u.data", "1\t2\t3", "u.data: line 2: has 3 columns, not 4 (user_id, movie, rating, time)"),
        ("u.data", "1\t2\t3\t4\t5", "u.data: line 2: has 5 columns"),
        ("u.data", "1\tx\t3\t4", "u.data: line 2: column movie: must be a whole number, got 'x'"),
        ("u.data", "1\t2\t4.5\t4", "u.data: line 2: column rating: must be a whole number, got '4.5'"),
        ("u.data", "1\t2\t6\t4", "u.data: line 2: column rating: must be 1 to 5, got 6"),
        ("u.data", "1\t2\t5\t", "u.data: line 2: column time: must be a whole number, got ''"),
        ("u.data", "", "u.data: line 2: has 1 columns"),
        ("u.data", "99\t2\t5\t4", "u.user: has no line for user_id 99"),
        ("u.data", "2\t99\t5\t4", "u.item: has no line for movie 99"),
        ("u.user", "1|2", "u.user: line 2: has 2 columns, not 5"),
        ("u.user", "1|24|M|writer|85711", "u.user: line 2: column user_id: must occur on one line only, got '1'"),
        ("u.item", f"x|A|||b|{FLAGS}", "u.item: line 2: column movie: must be a whole number, got 'x'"),
        ("u.item", f"2|A|||b|{FLAGS}|0", "u.item: line 2: has 25 columns, not 24 (movie, title, released"),
        ("u.item", f"2|A|||b|2{FLAGS[1:]}", "u.item: line 2: column unknown: must be 0 or 1, got '2'"),
    ],
)
def test_bad_lines_are_named(tmp_path, file, line, message):
    raw = write_100k(tmp_path / "raw", ratings_100k(100))
    edit(raw / file, 2, line)
    assert_refused(raw, message)


def test_bad_pairs_are_named(tmp_path):
    raw = write_1m(tmp_path / "raw", some_pairs())
    file = raw / "ratings.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_refused(raw, "ratings.parquet: cannot be read as Parquet")
    good = pl.DataFrame({"userID": ["1", "2"], "movieID": ["1", "2"]})
    good.with_columns(rating=3).write_parquet(file)
    assert_refused(raw, "must have the columns userID and movieID, got userID, movieID, rating")
    good.clear().write_parquet(file)
    assert_refused(raw, "ratings.parquet: is empty")
    good.with_columns(movieID=pl.Series(["1", "x"])).write_parquet(file)
    assert_refused(raw, "ratings.parquet: row 1: column movieID: must be a whole number, got 'x'")
    good.with_columns(userID=pl.Series(["1", None])).write_parquet(file)
    assert_refused(raw, "row 1: column userID: must be a whole number, got None")
    pl.DataFrame({"userID": ["1", "1", "2"], "movieID": ["1", "2", "2"]}).write_parquet(file)
    assert_refused(raw, "user 1 has all 2 movies, so no negative can be drawn")
    pl.DataFrame({"userID": ["77", "1"], "movieID": ["1", "2"]}).write_parquet(file)
    assert_refused(raw, "users.dat: has no line for user_id 77")


def test_bad_folders_are_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "other").mkdir()
    assert_refused(tmp_path / "other", "holds none of u.data, ratings.dat, ratings.parquet")
    raw = write_100k(tmp_path / "raw", ratings_100k(100))
    (raw / "u.user").unlink()
    assert_refused(raw, "u.user: no such file; ml-100k needs it beside u.data")
    (raw / "u.user").write_text("")
    assert_refused(raw, "u.user: is empty")
    (raw / "u.data").write_text("1\t1\t3\t5\n")
    assert_refused(raw, "u.data: holds no rating but 3")
    (raw / "u.data").write_text("")
    assert_refused(raw, "u.data: is empty")
    (raw / "u.data").unlink()
    (raw / "u.data").mkdir()
    assert_refused(raw, "u.data: cannot be read: Is a directory")


def test_bad_options_are_refused(tmp_path):
    raw = write_100k(tmp_path / "raw", ratings_100k(100))
    for options in ({"negatives": 0}, {"seed": -1}, {"valid": -0.1}, {"test": 1.0}):
        with pytest.raises(UserError):
            movielens.prepare(raw, tmp_path / "out", **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        movielens.prepare(raw, tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1], [2]]), "column userID: must hold whole numbers, holds list<"),
        (pa.array([1, 2**63 - 2], pa.timestamp("ms")), "column userID: must hold whole numbers, holds timestamp"),
        (pa.array([b"\xff", b"1"]).view(pa.string()), "cannot be read as Parquet"),
        (pa.array([2**64 - 1, 1], pa.uint64()), "row 0: column userID: must be a whole number"),
        (pa.array(["x" * 500, "1"]), "got 'xxxxxx"),
    ],
)
def test_pairs_of_other_types_are_refused(tmp_path, column, message):
    raw = write_1m(tmp_path / "raw", some_pairs())
    pq.write_table(pa.table({"userID": column, "movieID": ["1", "2"]}), raw / "ratings.parquet")
    assert_refused(raw, message)
