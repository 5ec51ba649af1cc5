"""Intervals against worked values and scipy's own, the bootstrap against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from embtab.compare.statistics import difference, mean_interval, resample_interval, resampled_auc
from embtab.training.metrics import auc


def test_the_interval_of_three_values_worked_by_hand() -> None:
    # mean 2, deviation 1, t(2) = 4.302653: 2 -+ 4.302653 / sqrt(3)
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2.0, 3)
    assert interval.low == pytest.approx(2 - 2.4841377, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.4841377, abs=1e-6)
    assert interval.excludes(-0.5)
    assert not interval.excludes(0.0)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8).filter(lambda values: np.std(values) > 1e-3))
@settings(max_examples=50, deadline=None)
def test_intervals_are_those_of_scipy(values: list[float]) -> None:
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_one_value_has_no_bounds() -> None:
    interval = mean_interval([0.7])
    assert (interval.mean, interval.low, interval.high, interval.count) == (0.7, None, None, 1)
    assert not interval.excludes(0.0)


def test_a_paired_difference_is_scipys_paired_t_test() -> None:
    mine, other = {0: 0.71, 1: 0.72, 2: 0.69, 7: 0.1}, {2: 0.68, 1: 0.70, 0: 0.70}
    expected = stats.ttest_rel([0.71, 0.72, 0.69], [0.70, 0.70, 0.68])
    bounds = expected.confidence_interval(0.95)
    found = difference(mine, other)
    assert found is not None
    assert found.mean == pytest.approx(0.04 / 3)
    assert (found.seeds.low, found.seeds.high) == pytest.approx((bounds.low, bounds.high))
    assert found.significant == (expected.pvalue < 0.05)
    assert difference({3: 0.5}, other) is None
    assert difference({0: 0.5}, {0: 0.4}).significant is None  # nothing is known of chance


def test_both_sources_of_chance_must_exclude_zero() -> None:
    steady = {0: [0.70, 0.71, 0.72], 1: [0.70, 0.71, 0.72]}
    shifted = {0: [0.69, 0.70, 0.71], 1: [0.69, 0.70, 0.71]}
    turned = {0: [0.72, 0.70, 0.68], 1: [0.72, 0.70, 0.68]}
    values, reference = {0: 0.71, 1: 0.7102}, {0: 0.70, 1: 0.70}
    assert difference(values, reference, steady, shifted).significant is True
    assert difference(values, reference, steady, turned).significant is False
    assert difference(values, reference, steady, {0: shifted[0]}).test is None


def brute_force(labels: np.ndarray, scores: np.ndarray, units: np.ndarray, repeats: int) -> list[float]:
    """Each resample written out row by row."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        drawn = generator.integers(0, units.max() + 1, units.max() + 1)
        rows = np.concatenate([np.flatnonzero(units == unit) for unit in drawn])
        found.append(auc(labels[rows], scores[rows]))
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_resampled_auc_is_that_of_the_rows_drawn(grouped: bool) -> None:
    generator = np.random.default_rng(5)
    scores = generator.integers(0, 9, 60) / 9  # ties
    labels = (generator.random(60) < scores).astype(float)
    units = generator.integers(0, 12, 60) if grouped else np.arange(60)
    units = np.unique(units, return_inverse=True)[1]
    names = units * 10 - 7 if grouped else None  # any integers name groups
    found = resampled_auc(labels, scores, names, repeats=20)
    assert found == pytest.approx(brute_force(labels, scores, units, 20), abs=1e-12)


def test_the_bootstrap_deviation_is_that_of_hanley_and_mcneil() -> None:
    generator = np.random.default_rng(2)
    labels = (np.arange(4000) % 4 == 0).astype(float)
    scores = generator.standard_normal(4000) + labels
    a, positives, negatives = auc(labels, scores), 1000, 3000
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + (positives - 1) * (q1 - a * a) + (negatives - 1) * (q2 - a * a)
    interval = resample_interval(a, resampled_auc(labels, scores))
    expected = 1.959964 * np.sqrt(variance / (positives * negatives))
    assert interval.high - interval.mean == pytest.approx(expected, rel=0.2)


def test_a_resample_without_a_class_has_no_auc() -> None:
    resampled = resampled_auc([1.0, 0.0], [0.3, 0.2], repeats=20)
    assert np.isnan(resampled).any()
    interval = resample_interval(0.5, resampled)
    assert not interval.known
    assert not interval.excludes(0.0)
