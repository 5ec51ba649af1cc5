from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtab.datasets.schema import Dataset
from embtab.datasets.synthetic import CARDINALITIES, generate, make_teacher, prepare
from embtab.datasets.teacher import EXPONENT, draw_rows, logits
from embtab.errors import UserError
from embtab.features import read_features
from embtab.training.metrics import auc, logloss

TINY = {"scale": 0.002, "seed": 7}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    return folder, prepare(folder, rows=150_000, multi=2, valid=0.1, test=0.3, **TINY)


def test_cardinalities_are_those_of_criteo():
    assert len(CARDINALITIES) == 26
    assert sum(CARDINALITIES) == 33_762_577
    full = [feature.num_ids for feature in make_teacher().features]
    assert full == list(CARDINALITIES)
    small = [feature.num_ids for feature in make_teacher(scale=0.002).features]
    assert small == [max(min(ids, 4), round(ids / 500)) for ids in CARDINALITIES]
    assert min(small) == 3


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=6), multi=st.sampled_from([0, 3]))
def test_any_range_is_reproducible(cuts, multi):
    teacher = make_teacher(multi=multi, **TINY)
    whole, whole_logits = generate(teacher, 0, 1000)
    edges = [0, *sorted(cuts), 1000]
    parts = [generate(teacher, low, high) for low, high in pairwise(edges)]
    assert pa.concat_tables([table for table, _ in parts]).combine_chunks().equals(whole.combine_chunks())
    assert np.array_equal(np.concatenate([log_odds for _, log_odds in parts]), whole_logits)


def test_far_rows_and_full_cardinalities():
    """Rows beyond 2^31 of a table of 33.8 million ids cost no more than the first ones."""
    teacher = make_teacher()
    table, log_odds = generate(teacher, 10**12, 10**12 + 500)
    assert np.isfinite(log_odds).all()
    for feature in teacher.features:
        ids = table[feature.name].to_numpy()
        assert ids.min() >= 0
        assert ids.max() < feature.num_ids
    assert table["C3"].to_numpy().max() > 1_000_000


def test_seeds_differ():
    first, second = (generate(make_teacher(scale=0.002, seed=seed), 0, 100)[0] for seed in (0, 1))
    for name in first.schema.names:
        assert not first[name].equals(second[name]), name


def test_ids_follow_the_power_law():
    teacher = make_teacher(**TINY)
    table, _ = generate(teacher, 0, 200_000)
    for name in ("C3", "C10", "C1"):
        num_ids = next(f.num_ids for f in teacher.features if f.name == name)
        ids = table[name].to_numpy()
        # The definition, integrated numerically: density (x + 1)^-1.05 on [0, num_ids), cut at whole numbers.
        fine = (np.arange(num_ids * 100) + 0.5) / 100
        mass = ((fine + 1) ** -EXPONENT).reshape(num_ids, 100).sum(axis=1)
        expected = 200_000 * mass / mass.sum()
        frequent = expected > 20
        got = np.bincount(ids, minlength=num_ids)
        chi2 = ((got - expected) ** 2 / expected)[frequent].sum() / frequent.sum()
        assert 0.5 < chi2 < 1.6 if frequent.sum() > 50 else chi2 < 4, (name, chi2)
        assert np.all(np.diff(expected) < 0)


def test_columns_are_independent_draws():
    table, _ = generate(make_teacher(**TINY), 0, 50_000)
    names = [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    values = np.log1p(np.stack([table[name].to_numpy() for name in names]))
    correlation = np.corrcoef(values) - np.eye(len(names))
    assert np.abs(correlation).max() < 5 / np.sqrt(50_000)


def test_labels_are_drawn_with_the_true_probabilities():
    table, log_odds = generate(make_teacher(ctr=0.25, **TINY), 0, 300_000)
    labels, probabilities = table["label"].to_numpy(), 1 / (1 + np.exp(-log_odds))
    assert abs(labels.mean() - 0.25) < 0.006
    bins = np.digitize(probabilities, np.linspace(0, 1, 21)[1:-1])
    for i in range(20):
        inside = bins == i
        variance = (probabilities * (1 - probabilities))[inside].sum()
        if variance > 10:
            assert abs((labels - probabilities)[inside].sum()) < 4.5 * np.sqrt(variance)


@pytest.mark.parametrize(("ctr", "signal"), [(0.5, 1.0), (0.03, 2.0)])
def test_rate_and_spread_are_as_asked(ctr, signal):
    _, log_odds = generate(make_teacher(ctr=ctr, signal=signal, **TINY), 0, 100_000)
    assert (1 / (1 + np.exp(-log_odds))).mean() == pytest.approx(ctr, rel=0.03)
    assert log_odds.std() == pytest.approx(signal, rel=0.02)


def test_bayes_metrics_are_those_of_the_true_logits(prepared):
    folder, dataset = prepared
    teacher = make_teacher(multi=2, **TINY)
    start = dataset.rows("train") + dataset.rows("valid")
    _, log_odds = generate(teacher, start, 150_000)
    labels = pq.read_table(folder / "test")["label"].to_numpy()
    assert len(labels) == 45_000
    assert dataset.bayes["auc"] == pytest.approx(auc(labels, log_odds), abs=1e-6)
    assert dataset.bayes["logloss"] == pytest.approx(logloss(labels, log_odds), abs=1e-9)
    assert 0.79 < dataset.bayes["auc"] < 0.83
    # Nothing but the true logits is best: noise on them costs.
    noisy = log_odds + np.random.default_rng(0).normal(0, 0.3, len(log_odds))
    assert auc(labels, noisy) < dataset.bayes["auc"] - 0.002


def test_files_hold_the_generated_rows_in_order(prepared):
    folder, dataset = prepared
    assert Dataset.load(folder) == dataset
    assert {split: dataset.rows(split) for split in ("train", "valid", "test")} == {
        "train": 90_000,
        "valid": 15_000,
        "test": 45_000,
    }
    teacher = make_teacher(multi=2, **TINY)
    whole, _ = generate(teacher, 0, 150_000)
    start = 0
    for split in ("train", "valid", "test"):
        table = pa.concat_tables([pq.read_table(folder / part.path) for part in dataset.parts(split)])
        assert table.combine_chunks().equals(whole.slice(start, len(table)).combine_chunks())
        assert table.schema.equals(dataset.arrow_schema(), check_metadata=True)
        start += len(table)


def test_counts_are_those_of_the_training_split(prepared):
    folder, dataset = prepared
    train = pq.read_table(folder / "train")
    for feature in read_features(folder):
        column = train[feature.name].combine_chunks()
        ids = column.flatten() if pa.types.is_list(column.type) else column
        assert np.array_equal(feature.counts, np.bincount(ids.to_numpy(), minlength=feature.num_ids)), feature.name
    lengths = np.diff(train["C1"].combine_chunks().offsets.to_numpy())
    assert np.allclose(np.bincount(lengths) / len(lengths), 1 / 6, atol=0.01)
    assert [feature.multi for feature in dataset.features] == [True] * 2 + [False] * 24


def test_ids_and_pairs_carry_signal():
    """A click depends on the rare ids of large features and on crosses: permuting either costs AUC."""
    teacher = make_teacher(**TINY)
    numbers = np.arange(100_000)
    table, log_odds = generate(teacher, 0, 100_000)
    labels = table["label"].to_numpy()
    best = auc(labels, log_odds)
    draws = draw_rows(teacher, numbers)
    rng = np.random.default_rng(0)
    for name in ("C3", "C12", "C21", "C16"):
        ids = draws.ids[name].copy()
        rare = ids > 100
        ids[rare] = rng.permutation(ids[rare])
        assert auc(labels, logits(teacher, replace(draws, ids={**draws.ids, name: ids}))) < best - 0.004, name
    for name in ("C7", "C18"):  # small features whose crosses weigh more than their own effects
        ids = rng.permutation(draws.ids[name])
        assert auc(labels, logits(teacher, replace(draws, ids={**draws.ids, name: ids}))) < best - 0.01, name


def test_what_is_learned_from_training_rows_holds_in_the_test_split(prepared):
    """Ids predict clicks in the next rows too: rates of the head ids of C3 in training hold in the test split."""
    folder, _ = prepared
    train, test = (pq.read_table(folder / split, columns=["label", "C3"]) for split in ("train", "test"))
    ids, labels = train["C3"].to_numpy(), train["label"].to_numpy()
    num_ids = ids.max() + 1
    rate = (np.bincount(ids, labels, num_ids) + 5) / (np.bincount(ids, minlength=num_ids) + 20)
    assert auc(test["label"].to_numpy(), rate[np.minimum(test["C3"].to_numpy(), num_ids - 1)]) > 0.53


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"scale": 0}, "scale must lie in"),
        ({"multi": 27}, r"multi must lie in \[0, 26\], got 27"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"ctr": 1.0}, "ctr must lie between 0 and 1"),
        ({"signal": -1.0}, "signal must lie in"),
        ({"valid": 0.5, "test": 0.5}, "below 1"),
    ],
)
def test_bad_options_leave_nothing_behind(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", **{"rows": 100, **options})
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        prepare(tmp_path / "out", rows=100, scale=0.001)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_few_rows_without_test_split(tmp_path):
    dataset = prepare(tmp_path / "out", rows=3, scale=0.001, valid=0, test=0)
    assert dataset.bayes is None
    assert dataset.rows("train") == 3
