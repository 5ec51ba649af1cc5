"""Ranking metrics in float64, exact: no bins, no sampling, ties counted as one half.

Every function takes one-dimensional arrays of equal length; labels are 0 or 1. A metric that is not defined for the
data at hand (one class only, no rows, a score that is NaN) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, ties counted half.

    The Mann-Whitney form, O(N log N). NaN unless both classes occur.
    """
    labels, scores = _floats(labels), _floats(scores)
    positives = labels.sum()
    negatives = len(labels) - positives
    if not positives or not negatives or np.isnan(scores).any():
        return float("nan")
    rank_sum = _average_ranks(scores) @ labels
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> float:
    """Grouped AUC: the mean of every user's AUC, weighted by the user's rows.

    Users with one class only have no AUC and are left out (Zhou et al., DIN, KDD 2018, arXiv 1706.06978, equation 7).
    NaN when no user is left.
    """
    labels, scores = _floats(labels), _floats(scores)
    _, group = np.unique(np.asarray(users), return_inverse=True)
    rows = np.bincount(group)
    positives = np.bincount(group, labels)
    # Ranked by (user, score), a user's rows are consecutive; ranks inside the user follow by subtracting its start.
    start = np.concatenate([[0], np.cumsum(rows)[:-1]])
    ranks = _average_ranks(scores, group) - start[group]
    rank_sums = np.bincount(group, ranks * labels)
    mixed = (positives > 0) & (positives < rows)
    if not mixed.any() or np.isnan(scores).any():
        return float("nan")
    p, n = positives[mixed], (rows - positives)[mixed]
    per_user = (rank_sums[mixed] - p * (p + 1) / 2) / (p * n)
    return float(np.average(per_user, weights=rows[mixed]))


def hit_rate(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int = 10) -> float:
    """HR@k: the share of a group's positives among its k highest scores, averaged over groups that have a positive.

    Under leave-one-out a group is a user, with one positive among drawn negatives. Rows of equal score stand in every
    order with equal chance, and the expectation over these orders is returned: a constant score gains nothing by the
    place of the positive in the file. NaN when no group has a positive, or a score is NaN.
    """
    return _gain(labels, scores, groups, lambda rank: (rank < k).astype(np.float64), lambda first: np.ones_like(first))


def ndcg(relevance: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int | None = None) -> float:
    """NDCG@k: discounted gain sum_r relevance_r / log2(r + 1) over the k highest scores of a group, as a share of the
    best possible, averaged over groups that have any relevance.

    The relevance is the gain as it is: 0 or 1, or graded and not negative. Ties as in `hit_rate` (McSherry and Najork,
    ECIR 2008). NaN when no group has any relevance, or a score is NaN.

    Args:
        relevance: float [N], not negative.
        scores: float [N].
        groups: [N], the ranking that each row belongs to.
        k: places that count; all of them if None.
    """

    def discounts(rank: Floats) -> Floats:
        return np.where(rank < (np.inf if k is None else k), 1 / np.log2(rank + 2), 0.0)

    return _gain(relevance, scores, groups, discounts, discounts)


def logloss(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean binary cross entropy in nats, from logits, so that no probability rounds to 0 or 1."""
    labels, logits = _floats(labels), _floats(logits)
    if not len(labels):
        return float("nan")
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


def normalised_entropy(labels: ArrayLike, logits: ArrayLike) -> float:
    """Log loss divided by that of always predicting the base rate: below 1 is better than knowing the base rate only.

    He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014. NaN unless both classes occur.
    """
    labels = _floats(labels)
    rate = labels.mean() if len(labels) else 0.0
    if rate in (0.0, 1.0):
        return float("nan")
    return logloss(labels, logits) / float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def calibration(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean predicted probability divided by the observed rate: 1 is calibrated. NaN without a positive label."""
    labels, logits = _floats(labels), _floats(logits)
    if not labels.any():
        return float("nan")
    return float(sigmoid(logits).mean() / labels.mean())


def sigmoid(logits: ArrayLike) -> Floats:
    """1 / (1 + exp(-logits)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -_floats(logits)))


def evaluate(labels: ArrayLike, logits: ArrayLike, users: ArrayLike | None = None) -> dict[str, float]:
    """All metrics by name: auc, logloss, ne, calibration; gauc where users are known; hr@10 and ndcg@10 where each user
    has one positive row among others, as leave-one-out gives it.
    """
    found = {
        "auc": auc(labels, logits),
        "logloss": logloss(labels, logits),
        "ne": normalised_entropy(labels, logits),
        "calibration": calibration(labels, logits),
    }
    if users is not None:
        found["gauc"] = gauc(labels, logits, users)
        if _left_one_out(labels, users):
            found |= {"hr@10": hit_rate(labels, logits, users), "ndcg@10": ndcg(labels, logits, users, 10)}
    return found


def _left_one_out(labels: ArrayLike, users: ArrayLike) -> bool:
    """Whether every user has exactly one positive row, and a negative one."""
    _, group, rows = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    positives = np.bincount(group, _floats(labels), minlength=len(rows))
    return bool(len(rows) and (positives == 1).all() and (rows > 1).all())


def _gain(
    relevance: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    discounts: Callable[[Floats], Floats],
    best: Callable[[Floats], Floats],
) -> float:
    """The expected discounted relevance of each group, as a share of what `best` discounts give the ideal order."""
    relevance, scores = _floats(relevance), _floats(scores)
    if not len(scores) or np.isnan(scores).any():
        return float("nan")
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    order, block, rank = _ranked(scores, group)
    expected = (np.bincount(block, discounts(rank)) / np.bincount(block))[block]
    gains = np.bincount(group[order], relevance[order] * expected)
    order, _, rank = _ranked(relevance, group)
    ideal = np.bincount(group[order], relevance[order] * best(rank))
    counted = ideal > 0
    return float(np.mean(gains[counted] / ideal[counted])) if counted.any() else float("nan")


def _ranked(scores: Floats, group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Rows by (group, descending score); for each of them the number of its block of ties and its 0-based rank."""
    order = np.lexsort((-scores, group))
    fresh = np.ones(len(order), dtype=bool)
    new_group = group[order][1:] != group[order][:-1]
    fresh[1:] = new_group | (scores[order][1:] != scores[order][:-1])
    starts = np.flatnonzero(np.concatenate([[True], new_group]))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return order, np.cumsum(fresh) - 1, rank.astype(np.float64)


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _average_ranks(scores: Floats, group: NDArray[np.int64] | None = None) -> Floats:
    """1-based ranks in the order of (group, score); equal scores of one group share the mean of their ranks."""
    order = np.argsort(scores, kind="stable") if group is None else np.lexsort((scores, group))
    ordered = scores[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    if group is not None:
        fresh[1:] |= group[order][1:] != group[order][:-1]
    first = np.flatnonzero(fresh)
    sizes = np.diff(first, append=len(order))
    ranks = np.empty(len(order))
    ranks[order] = np.repeat(first + (sizes + 1) / 2, sizes)
    return ranks
