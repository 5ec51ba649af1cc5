"""Intervals against worked values and scipy's own, the bootstrap against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from embtab.compare.statistics import (
    difference,
    half_width,
    mean_interval,
    resample_interval,
    resampled_auc,
    shared_variance,
)
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


def test_both_variances_are_in_the_interval_worked_by_hand() -> None:
    values, zeros = {0: 0.01, 1: 0.02, 2: 0.03}, {0: 0.0, 1: 0.0, 2: 0.0}
    shared = [0.018, 0.02, 0.022]  # of variance 4e-6, the same for every seed
    moved = {seed: [value - 0.02 + each for each in shared] for seed, value in values.items()}
    found = difference(values, zeros, moved, dict.fromkeys(zeros, [0.0] * 3))
    of_seeds, of_tests = 1e-4 / 3, 4e-6
    share = of_seeds / (of_seeds + of_tests)
    critical = 1.959964 + (4.302653 - 1.959964) * share**1.5
    half = critical * np.sqrt(of_seeds + of_tests)
    assert (found.whole.low, found.whole.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert found.significant is bool(half < 0.02)


def test_two_seeds_have_an_interval_of_seeds_alone_and_one_has_that_of_the_test_set() -> None:
    up, down = {0: [0.70, 0.71, 0.72], 1: [0.70, 0.71, 0.72]}, {0: [0.69, 0.70, 0.71], 1: [0.69, 0.70, 0.71]}
    both = difference({0: 0.71, 1: 0.7102}, {0: 0.70, 1: 0.70}, up, down)
    assert both.significant is None
    assert not both.whole.known
    alone = difference({0: 0.71, 1: 0.7102}, {0: 0.70, 1: 0.70}, up, {0: down[0]})
    assert alone.test is None
    assert alone.whole == alone.seeds
    one = difference({0: 0.71}, {0: 0.70}, up, down)
    assert one.whole == one.test
    assert difference({0: 0.71}, {0: 0.70}, up, {0: [0.69, float("nan"), 0.7]}).significant is None


def test_what_the_test_set_does_to_one_seed_alone_is_not_counted_twice() -> None:
    rng = np.random.default_rng(0)
    own, shared = rng.normal(size=(5, 100_000)), rng.normal(0, 2, 100_000)
    assert shared_variance(own + shared) == pytest.approx(4, rel=0.05)
    assert shared_variance(own) == pytest.approx(0, abs=0.02)


RATIOS = (0.0, 0.3, 1.0, 3.0, 10.0)


def wrong_by_chance(seeds: int, ratio: float, own: float, draws: int, resamples: int = 200) -> float:
    """The share of significant differences among tables without any.

    Args:
        seeds: of each comparison.
        ratio: deviation of the mean over seeds to that over test sets.
        own: deviation of what a test set does to a single seed, as a multiple of what it does to all.
        draws: comparisons.
        resamples: of the test set.
    """
    rng = np.random.default_rng([seeds, int(10 * ratio), int(10 * own)])
    names, found = range(seeds), 0
    zeros, still = dict.fromkeys(names, 0.0), dict.fromkeys(names, np.zeros(resamples))
    for _ in range(draws):
        gaps = rng.normal(0, ratio * np.sqrt(seeds), seeds) + rng.normal() + rng.normal(0, own, seeds)
        moved = gaps[:, None] + rng.normal(size=resamples) + rng.normal(0, own, (seeds, resamples))
        gap = difference(dict(enumerate(gaps)), zeros, dict(enumerate(moved)), still)
        found += bool(gap.significant)
    return found / draws


@pytest.mark.parametrize("seeds", [3, 10])
def test_about_one_in_twenty_is_wrong_by_chance(seeds: int) -> None:
    assert 0.03 < wrong_by_chance(seeds, 1.0, 0.0, 2500) < 0.07


@pytest.mark.slow
@pytest.mark.parametrize("own", [0.0, 1.0])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
def test_the_level_is_held_whatever_chance_comes_from(seeds: int, ratio: float, own: float) -> None:
    assert 0.035 < wrong_by_chance(seeds, ratio, own, 20_000) < 0.062  # 4 to 6 %, and two deviations of 20,000 draws


@pytest.mark.parametrize("seeds", [3, 4, 5, 10, 20])
def test_the_level_is_held_by_integration(seeds: int) -> None:
    """The same without drawing: the mean is normal, the variance over seeds chi-squared, that over test sets known."""
    quantiles = (np.arange(2000) + 0.5) / 2000
    for ratio in np.geomspace(0.01, 100, 25):
        estimated = ratio**2 * stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1)
        halves = np.array([half_width(each, 1.0, seeds) for each in estimated])
        assert 0.04 <= 2 * stats.norm.sf(halves / np.sqrt(ratio**2 + 1)).mean() <= 0.06


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
