"""Behaviour sequences, against plain Python over the raw events; generated histories, against their planted truth."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtab.datasets import long_histories, sequences
from embtab.datasets.check import check
from embtab.datasets.events import read_events
from embtab.datasets.histories import before, pieces
from embtab.datasets.negatives import Negatives
from embtab.datasets.reader import ParquetBatches
from embtab.datasets.schema import Dataset
from embtab.errors import DataError, UserError
from embtab.features import id_spaces, read_features

ITEMS = [f"i{n}" for n in range(60)]
CATEGORIES = {item: f"c{n % 7}" for n, item in enumerate(ITEMS)}


def histories(users: int = 25, seed: int = 0, longest: int = 20) -> dict[str, list[str]]:
    rng = random.Random(seed)
    return {f"u{u}": rng.sample(ITEMS, rng.randint(3, longest)) for u in range(users)}


def write_s3rec(folder: Path, events: dict[str, list[str]], sample: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "toy.txt"
    file.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in events.items()))
    attributes = {item: [category, "more"] for item, category in CATEGORIES.items()}
    (folder / "toy_item2attributes.json").write_text(json.dumps(attributes))
    if sample:
        (folder / "toy_sample.txt").write_text("".join(f"{u} {' '.join(items)}\n" for u, items in sample.items()))
    return file


def read_back(folder: Path, split: str) -> list[dict]:
    """The rows with raw values instead of ids, and the history cut to its events."""
    dataset = Dataset.load(folder)
    rows = pl.read_parquet(folder / split / "*.parquet").to_dicts()
    for feature in dataset.features:
        values = pl.read_parquet(folder / "vocab" / f"{feature.name}.parquet")["value"].to_list()
        for row in rows:
            ids = row[feature.name]
            row[feature.name] = [values[i] for i in ids] if feature.multi else values[ids]
    return rows


def test_leave_one_out_against_plain_python(tmp_path):
    events = histories()
    file = write_s3rec(tmp_path / "raw", events)
    out = tmp_path / "out"
    dataset = sequences.prepare(file, out, max_history=8, targets=4, negatives=2, eval_negatives=9, seed=3)
    assert check(out) == []
    known = {item for items in events.values() for item in items[:-2]}
    users = list(events)
    for split, places in (("train", None), ("valid", -2), ("test", -1)):
        rows = read_back(out, split)
        width = 3 if split == "train" else 10
        positives = rows[::width]
        wanted = []
        for user, items in events.items():
            last = len(items) - 2
            at = [len(items) + places] if places else range(max(1, last - 4), last)
            wanted += [(users.index(user), items[i], items[max(0, i - 8) : i]) for i in at]
        assert len(rows) == dataset.rows(split) == len(wanted) * width
        for start, (user, item, history) in enumerate(wanted):
            group = rows[start * width : (start + 1) * width]
            assert [row["label"] for row in group] == [1] + [0] * (width - 1)
            assert positives[start]["item"] == (item if item in known else None)
            drawn = [row["item"] for row in group[1:]]
            touched = events[users[user]]
            assert not set(drawn) & set({"train": touched[:-2], "valid": touched[:-1], "test": touched}[split])
            assert len(set(drawn) - {None}) >= len(drawn) - drawn.count(None)
            for row in group:
                assert row["user_id"] == user
                assert row["history_item"] == [event if event in known else None for event in history]
                assert row["history_category"] == [CATEGORIES[event] for event in history]
                assert row["history_position"] == [str(age) for age in range(len(history), 0, -1)]
                assert row["position"] == "0"
                if row["item"] is not None:
                    assert row["category"] == CATEGORIES[row["item"]]


def test_id_spaces_are_shared_and_counts_are_of_train(tmp_path):
    out = tmp_path / "out"
    sequences.prepare(write_s3rec(tmp_path / "raw", histories()), out, eval_negatives=9)
    features = {feature.name: feature for feature in read_features(out)}
    assert features["item"].space == features["history_item"].space == "items"
    assert features["history_position"].pooling == "none"
    (items,) = (space for space in id_spaces(list(features.values())) if space.name == "items")
    train = pl.read_parquet(out / "train" / "*.parquet")
    both = np.concatenate([train["item"].to_numpy(), train["history_item"].explode().to_numpy()])
    np.testing.assert_array_equal(items.counts, np.bincount(both, minlength=items.num_ids))


def test_published_negatives_are_taken_as_they_are(tmp_path):
    events = histories(8)
    sample = {user: [item for item in ITEMS if item not in items][:5] for user, items in events.items()}
    out = tmp_path / "out"
    sequences.prepare(write_s3rec(tmp_path / "raw", events, sample), out, eval_negatives=7)
    known = {item for items in events.values() for item in items[:-2]}
    rows = read_back(out, "test")
    for user, group in zip(events, (rows[i : i + 6] for i in range(0, len(rows), 6)), strict=True):
        assert [row["item"] for row in group[1:]] == [item if item in known else None for item in sample[user]]
    assert len(read_back(out, "valid")) == 8 * 8


def test_training_negatives_do_not_tell_what_the_test_holds(tmp_path):
    """An item of a user's test is as often her training negative as an item that she never touches."""
    events = {f"u{u}": items for u, items in enumerate(random.Random(u).sample(ITEMS, 20) for u in range(200))}
    out = tmp_path / "out"
    sequences.prepare(write_s3rec(tmp_path / "raw", events), out, negatives=3, eval_negatives=3)
    later = other = 0
    for row in read_back(out, "train"):
        touched = events[f"u{row['user_id']}"]
        later += not row["label"] and row["item"] in touched[-2:]
        other += not row["label"] and row["item"] not in touched
    assert later / 2 == pytest.approx(other / 40, rel=0.15)


def test_the_same_seed_gives_the_same_files(tmp_path):
    file = write_s3rec(tmp_path / "raw", histories())
    made = [sequences.prepare(file, tmp_path / str(i), eval_negatives=9, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def write_timed(kind: str, folder: Path, rows: list[tuple[str, str, int]]) -> Path:
    folder.mkdir()
    if kind == "ml-100k":
        (folder / "u.data").write_text("".join(f"{u}\t{i}\t3\t{t}\n" for u, i, t in rows))
        flags = "|".join("0" * 18)
        (folder / "u.item").write_text("".join(f"{i}|t|d||x|1|{flags}\n" for i in ITEMS), encoding="latin-1")
        users = dict.fromkeys(u for u, _, _ in rows)
        (folder / "u.user").write_text("".join(f"{u}|30|F|artist|12345\n" for u in users))
        return folder
    if kind == "taobao":
        lines = [f"{u},{i},{CATEGORIES[i]},pv,{t}\n" for u, i, t in rows]
        (folder / "UserBehavior.csv").write_text("".join([*lines, "u0,i1,c1,buy,5\n"]))
        return folder / "UserBehavior.csv"
    reviews = [json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) + "\n" for u, i, t in rows]
    (folder / "reviews.json").write_text("".join(reviews))
    return folder / "reviews.json"


def timed(rows: int = 400) -> list[tuple[str, str, int]]:
    rng = random.Random(0)
    pairs = rng.sample([(f"u{u}", item) for u in range(20) for item in ITEMS], rows)
    return [(user, item, 1000 + rng.randrange(150)) for user, item in pairs]


@pytest.mark.parametrize("kind", ["ml-100k", "taobao", "amazon"])
def test_formats_with_times(tmp_path, kind):
    rows = timed()
    events = read_events(write_timed(kind, tmp_path / "raw", rows))
    ordered = sorted(rows, key=lambda row: (row[0], row[2]))  # stable, as equal times must be
    assert events.rows.rows() == ordered
    assert (events.categories is None) == (kind == "amazon")
    if kind == "taobao":
        assert events.categories == {item: CATEGORIES[item] for _, item, _ in rows}
        assert events.dropped == {"not a page view": 1}


@pytest.mark.parametrize("kind", ["ml-100k", "taobao", "amazon"])
def test_split_by_time_never_trains_on_what_comes_later(tmp_path, kind):
    rows = timed()
    out = tmp_path / "out"
    raw = write_timed(kind, tmp_path / "raw", rows)
    sequences.prepare(raw, out, split="time", valid=0.2, test=0.2, eval_negatives=5, targets=100)
    when = {(user, item): time for user, item, time in rows}
    names = sorted({user for user, _, _ in rows})
    spans = {}
    seen = set()
    for split in ("train", "valid", "test"):
        targets = [row for row in read_back(out, split) if row["label"] == 1 and row["item"] is not None]
        times = [when[names[row["user_id"]], row["item"]] for row in targets]
        spans[split] = (min(times), max(times))
        for row, time in zip(targets, times, strict=True):
            history = [when[names[row["user_id"]], item] for item in row["history_item"] if item is not None]
            assert history == sorted(history)
            assert all(earlier <= time for earlier in history)
            if split == "train":
                seen |= {*row["history_item"], row["item"]}
    assert spans["train"][1] < spans["valid"][0] <= spans["valid"][1] < spans["test"][0]
    values = pl.read_parquet(out / "vocab" / "item.parquet")["value"].to_list()[1:]
    assert seen <= set(values)  # the vocabulary also holds each user's first event, which is no target
    assert check(out) == []


def test_user_columns_of_ml100k(tmp_path):
    out = tmp_path / "out"
    sequences.prepare(write_timed("ml-100k", tmp_path / "raw", timed()), out, eval_negatives=5)
    row = read_back(out, "train")[0]
    assert (row["age"], row["gender"], row["occupation"]) == ("30", "F", "artist")
    assert row["category"] == "1" + "0" * 18


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from(["uniform", "popularity"]))
def test_negatives_are_distinct_and_untouched(seed, count, sampler):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 4, 60), rng.integers(0, 25, 60)
    negatives = Negatives(users, items, 25, sampler)
    room = min(len(negatives.untouched(user)) for user in range(4))
    asked = rng.integers(0, 4, 30)
    if room < count:
        asked = np.append(asked, [user for user in range(4) if len(negatives.untouched(user)) == room])
        with pytest.raises(UserError, match="untouched"):
            negatives.draw(asked, count, rng)
        return
    for user, drawn in zip(asked, negatives.draw(asked, count, rng), strict=True):
        assert len(set(drawn)) == count
        assert not set(drawn) & set(items[users == user])
        assert sampler == "uniform" or set(drawn) <= set(items)


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_negatives_have_the_right_chances(sampler):
    users = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1])
    items = np.array([0, 1, 2, 2, 2, 2, 3, 3, 4])
    drawn = Negatives(users, items, 6, sampler).draw(np.zeros(40_000, np.int64), 1, np.random.default_rng(0)).ravel()
    wanted = [0, 0, 4 / 7, 2 / 7, 1 / 7, 0] if sampler == "popularity" else [0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 40_000, wanted, atol=0.01)


def test_before_and_pieces():
    events, ages = before(np.array([3, 10]), np.array([2, 3]))
    assert events.tolist() == [1, 2, 7, 8, 9]
    assert ages.tolist() == [2, 1, 3, 2, 1]
    sizes = np.array([3_000_000, 2_000_000, 5_000_000, 1, 1])
    assert list(pieces(sizes)) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert list(pieces(np.ones(5, np.int64), rows=40_000)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_mistakes_are_named(tmp_path):
    file = write_s3rec(tmp_path / "raw", histories())
    out = tmp_path / "out"
    for options, message in [
        ({"split": "random"}, "split must be one of"),
        ({"split": "time"}, "has no times"),
        ({"sampler": "best"}, "sampler must be one of"),
        ({"targets": 0}, "targets must be 1 or more"),
        ({"kind": "csv"}, "unknown kind"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"eval_negatives": 60}, "untouched"),
        ({"min_events": 100}, "no user has 100 events"),
    ]:
        with pytest.raises(UserError, match=message):
            sequences.prepare(file, out, **{"eval_negatives": 5, **options})
    bad = tmp_path / "bad.txt"
    for text, message in [("u1 a b c\nu1 d e f\n", "line 2: user u1"), ("u1 a b c\nu2\n", "line 2: must be")]:
        bad.write_text(text)
        with pytest.raises(DataError, match=message):
            sequences.prepare(bad, out)
    views = tmp_path / "bad.csv"
    for text in ("1,2,3,pv\n", "1,2,3,pv,4,5\n"):
        views.write_text(text)
        with pytest.raises(DataError, match=f"has {text.count(',') + 1} columns, not 5"):
            sequences.prepare(views, out)
    reviews = tmp_path / "bad.json"
    reviews.write_text('{"reviewerID": "u", "asin": "i", "unixReviewTime": 3}\n{"asin": "i"}\n')
    with pytest.raises(DataError, match="line 2"):
        sequences.prepare(reviews, out)
    touched = {user: [items[0], "i1"] for user, items in histories().items()}
    with pytest.raises(DataError, match="negative is in the history"):
        sequences.prepare(write_s3rec(tmp_path / "sampled", histories(), touched), out)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "log.dat").write_text("u1 a b c\n")
    (tmp_path / "bought.csv").write_text("1,2,3,buy,4\n")
    for name, message in [
        ("gone.txt", "no such file or folder"),
        ("log.dat", "the name does not tell what it is; say --kind"),
        ("empty.txt", "is empty"),
        ("bought.csv", "holds no page view"),
    ]:
        with pytest.raises(UserError, match=message):
            sequences.prepare(tmp_path / name, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "data"
    long_histories.prepare(out, users=400, min_length=20, max_length=40, items=300, interests=12, per_user=4, seed=5)
    return out


def test_planted_histories_hold_their_truth(planted):
    dataset = Dataset.load(planted)
    assert check(planted) == []
    world = long_histories.World.drawn(300, 12, 5, np.random.default_rng((5, 0)))
    scores, labels = [], []
    users = {}
    for split in ("train", "valid", "test"):
        rows = pl.read_parquet(planted / split / "*.parquet").to_dicts()
        users[split] = {row["user_id"] for row in rows}
        for row in rows:
            relevant = [float(world.interest[e] == world.interest[row["item"]]) for e in row["history_item"]]
            assert row["relevance"] == relevant
            assert 20 <= len(relevant) <= 40
            tastes = [
                world.taste[row["item"]] @ world.taste[e]
                for e, r in zip(row["history_item"], relevant, strict=True)
                if r
            ]
            if split == "test":
                scores.append(np.mean(tastes) if tastes else 0.0)
                labels.append(row["label"])
    assert not users["train"] & users["test"]
    scores, labels = np.array(scores), np.array(labels)
    pairs = scores[labels == 1][:, None] - scores[labels == 0]
    assert dataset.bayes["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-4)
    assert 0.7 < dataset.bayes["auc"] < 0.9


def test_batches_do_not_hold_the_truth(planted):
    batch = next(iter(ParquetBatches(planted, "test", 16, prefetch=0)))
    names = batch.sparse.keys()
    assert names[:2] == ["item", "category"]
    assert "relevance" not in names
    assert len(batch) == 16


def test_damaged_truth_is_found(planted, tmp_path):
    import shutil
    from dataclasses import replace

    from embtab.datasets.schema import describe_files, open_writer

    folder = tmp_path / "data"
    shutil.copytree(planted, folder)
    part = folder / "test" / "part-00000.parquet"
    table = pl.read_parquet(part)
    bad = table["relevance"].to_list()
    bad[3][1] = float("nan")
    dataset = Dataset.load(folder)
    changed = table.with_columns(pl.Series("relevance", bad, dtype=pl.List(pl.Float32)))
    with open_writer(part, dataset.arrow_schema()) as writer:
        writer.write_table(changed.to_arrow().cast(dataset.arrow_schema()))
    replace(dataset, files=describe_files(folder)).save(folder)
    (problem,) = check(folder)
    assert (problem.column, problem.row) == ("relevance", 3)


def test_planted_mistakes(tmp_path):
    for options, message in [({"users": 0}, "users"), ({"signal": 0}, "signal"), ({"max_length": 10}, "max_length")]:
        with pytest.raises(UserError, match=message):
            long_histories.prepare(tmp_path / "x", **options)


def test_a_byte_order_mark_is_no_part_of_a_user(tmp_path):
    file = write_s3rec(tmp_path / "raw", histories())
    plain = read_events(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_events(file).rows.equals(plain.rows)


@pytest.mark.parametrize("name", ["u.user", "u.item"])
def test_who_stands_twice_in_ml100k_is_refused(tmp_path, name):
    """The second line of a user would move the attributes of all users after her."""
    file = write_timed("ml-100k", tmp_path / "raw", timed()) / name
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(DataError, match=rf"{name}: line 4: its first column stands on an earlier line already"):
        read_events(file.parent)


@pytest.mark.parametrize(
    "review",
    [
        '{"reviewerID": null, "asin": "i", "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": 1.5, "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": "\\ud800", "unixReviewTime": 3}',
        '{"reviewerID": "u", "asin": "i", "unixReviewTime": Infinity}',
        '{"reviewerID": "u", "asin": "i", "unixReviewTime": 3.5}',
        '{"reviewerID": "u", "asin": "i", "unixReviewTime": true}',
        "[" * 100_000,
        "7",
    ],
)
def test_a_review_without_names_or_a_time_is_refused(tmp_path, review):
    file = tmp_path / "reviews.json"
    file.write_text('{"reviewerID": "u", "asin": "i", "unixReviewTime": 3}\n' + review + "\n")
    with pytest.raises(DataError, match="line 2: must be a JSON object"):
        read_events(file)


def test_bad_page_views_are_named_by_their_line(tmp_path):
    file = tmp_path / "views.csv"
    file.write_text("1,2,3,buy,5\n1,2,3,pv,5\n1,2,3,pv,x\n")
    with pytest.raises(DataError, match="line 3: the timestamp must be a whole number"):
        read_events(file)
    file.write_bytes(gzip.compress(b"1,2,3,pv,5\n" * 90)[:-9])
    with pytest.raises(DataError, match=r"views.csv: not a comma-separated file"):
        read_events(file)


@pytest.mark.parametrize("values", ['"word"', "7", "null", "[null]", "[1.5]"])
def test_attributes_must_be_lists_of_names(tmp_path, values):
    file = write_s3rec(tmp_path / "raw", histories())
    (tmp_path / "raw" / "toy_item2attributes.json").write_text(f'{{"i1": {values}}}')
    with pytest.raises(DataError, match=r"toy_item2attributes.json: must be a JSON object"):
        read_events(file)


def test_a_folder_in_the_place_of_a_log(tmp_path):
    for kind in ("s3rec", "taobao", "amazon"):
        with pytest.raises(DataError, match=str(tmp_path)):
            read_events(tmp_path, kind)
