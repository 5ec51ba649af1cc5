"""Metrics against brute force over all pairs, and worked values."""

import math
import time
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embtab.training import metrics

# Few distinct scores, so that ties are the rule; -0.0 and 0.0 are one score.
scores = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.5000000000000001, 1e300])
rows = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), scores, st.sampled_from([-7, 0, 2**53 + 1, 2**62])), max_size=40)


def auc_by_pairs(labels, scores):
    positive = [s for y, s in zip(labels, scores, strict=True) if y]
    negative = [s for y, s in zip(labels, scores, strict=True) if not y]
    if not positive or not negative:
        return math.nan
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def columns(data):
    return [[row[i] for row in data] for i in range(3)]


@given(rows)
def test_auc_counts_pairs(data):
    labels, scores, _ = columns(data)
    assert metrics.auc(labels, scores) == pytest.approx(auc_by_pairs(labels, scores), abs=1e-12, nan_ok=True)


@given(rows)
def test_gauc_is_the_weighted_mean_over_users(data):
    labels, scores, users = columns(data)
    parts = []
    for user in set(users):
        mine = [i for i, other in enumerate(users) if other == user]
        value = auc_by_pairs([labels[i] for i in mine], [scores[i] for i in mine])
        if not math.isnan(value):
            parts.append((len(mine), value))
    expected = sum(n * v for n, v in parts) / sum(n for n, _ in parts) if parts else math.nan
    found = metrics.gauc(labels, scores, np.array(users, dtype=np.int64))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(rows)
def test_gauc_of_one_user_is_auc(data):
    labels, scores, _ = columns(data)
    one = metrics.gauc(labels, scores, np.zeros(len(data), dtype=np.int64))
    assert one == pytest.approx(metrics.auc(labels, scores), abs=1e-12, nan_ok=True)


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.floats(-15, 15)), min_size=1, max_size=30))
def test_logloss_and_its_relatives_follow_their_definitions(data):
    labels, logits = np.array(data, dtype=float).T
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert metrics.logloss(labels, logits) == pytest.approx(expected, rel=1e-6)
    rate = labels.mean()
    if 0 < rate < 1:
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert metrics.normalised_entropy(labels, logits) == pytest.approx(expected / entropy, rel=1e-6)
        assert metrics.calibration(labels, logits) == pytest.approx(p.mean() / rate, rel=1e-9)
    else:
        assert math.isnan(metrics.normalised_entropy(labels, logits))


def over_all_orders(relevance, scores, groups, discount):
    """The mean over every order of equal scores, of every group."""
    found = []
    for group in set(groups):
        mine = [i for i, other in enumerate(groups) if other == group]
        if not any(relevance[i] for i in mine):
            continue
        orders = [o for o in permutations(mine) if all(scores[a] >= scores[b] for a, b in pairwise(o))]
        best = sum(r * discount(place) for place, r in enumerate(sorted((relevance[i] for i in mine), reverse=True)))
        gains = [sum(relevance[i] * discount(place) for place, i in enumerate(order)) for order in orders]
        found.append(sum(gains) / len(gains) / best)
    return sum(found) / len(found) if found else math.nan


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), scores, st.sampled_from([3, 9])), max_size=6),
    st.sampled_from([1, 2, 3, None]),
)
def test_ndcg_is_the_mean_over_all_orders_of_ties(data, k):
    def discount(place):
        return 1 / math.log2(place + 2) if k is None or place < k else 0.0

    found = metrics.ndcg(*columns(data), k)
    assert found == pytest.approx(over_all_orders(*columns(data), discount), abs=1e-12, nan_ok=True)


@given(st.lists(st.tuples(scores, st.sampled_from([3, 9])), min_size=1, max_size=6), st.integers(1, 4))
def test_hit_rate_is_the_mean_over_all_orders_of_ties(data, k):
    values, groups = [row[0] for row in data], [row[1] for row in data]
    labels = [float(group not in groups[:i]) for i, group in enumerate(groups)]  # the first row of each group
    found = []
    for group in set(groups):
        mine = [i for i, other in enumerate(groups) if other == group]
        orders = [o for o in permutations(mine) if all(values[a] >= values[b] for a, b in pairwise(o))]
        found.append(sum(mine[0] in order[:k] for order in orders) / len(orders))
    assert metrics.hit_rate(labels, values, groups, k) == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_leave_one_out_worked():
    labels = [1, 0, 0, 0, 0, 1, 0, 0]
    scores, users = [0.1, 0.9, 0.5, 0.2, 1.0, 2.0, 0.0, 0.5], [7] * 4 + [8] * 4
    assert metrics.hit_rate(labels, scores, users, 3) == 0.5  # the positive stands fourth, and first
    assert metrics.ndcg(labels, scores, users) == pytest.approx((1 / math.log2(5) + 1) / 2)
    assert metrics.hit_rate(labels, [0.0] * 8, users, 1) == 0.25
    with_ranking = metrics.evaluate(labels, scores, users)
    assert list(with_ranking)[-2:] == ["hr@10", "ndcg@10"]
    assert with_ranking["hr@10"] == 1.0
    assert "hr@10" not in metrics.evaluate([1, 1, 0, 0], scores[:4], users[:4])
    assert "hr@10" not in metrics.evaluate([1, 0, 1], [0.0, 1.0, 2.0], [1, 1, 2])


def test_extreme_logits_stay_finite():
    assert metrics.logloss([1, 0], [-800.0, 800.0]) == 800.0
    assert metrics.logloss([1, 0], [800.0, -800.0]) == 0.0
    assert metrics.sigmoid([-800.0, 0.0, 800.0]).tolist() == [0.0, 0.5, 1.0]


def test_worked_values():
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    base_rate = math.log(0.25 / 0.75)
    assert metrics.normalised_entropy([1, 0, 0, 0], [base_rate] * 4) == pytest.approx(1.0)
    assert metrics.calibration([1, 0, 0, 0], [base_rate] * 4) == pytest.approx(1.0)
    assert metrics.logloss([1], [0.0]) == pytest.approx(math.log(2))


def test_evaluate_names_every_metric():
    labels, logits = [0, 1, 1, 0], [-1.0, 2.0, -2.0, 0.5]
    assert list(metrics.evaluate(labels, logits)) == ["auc", "logloss", "ne", "calibration"]
    with_users = metrics.evaluate(labels, logits, [1, 1, 2, 2])
    assert with_users["gauc"] == 0.5
    assert with_users["auc"] == metrics.auc(labels, logits) == 0.5


@pytest.mark.filterwarnings("ignore:invalid value")
def test_no_rows_and_one_class_are_nan():
    assert all(math.isnan(value) for value in metrics.evaluate([], [], []).values())
    assert math.isnan(metrics.auc([1, 1], [0.0, 1.0]))
    assert math.isnan(metrics.calibration([0, 0], [0.0, 1.0]))
    assert math.isnan(metrics.gauc([1, 0], [0.0, 1.0], [1, 2]))
    assert all(math.isnan(value) for value in metrics.evaluate([1, 0, 0], [2.0, math.nan, 1.0], [1, 1, 1]).values())


def test_a_million_rows_take_seconds_not_minutes():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 10**6), random.normal(size=10**6)
    start = time.perf_counter()
    assert metrics.gauc(labels, scores, random.integers(0, 10**5, 10**6)) == pytest.approx(0.5, abs=0.005)
    assert time.perf_counter() - start < 10
