"""Frequency cut: hot ids never collide, and counts decide which ids are hot."""

import numpy as np
import pytest

import embtab as et
from embtab.errors import UserError
from embtab.methods.freqcut import FreqCut

ZIPF = (1e6 / np.arange(1, 10_001)).astype(np.int64)


def cut(counts: np.ndarray | None, budget: object = "0.1x", **options: object) -> FreqCut:
    feature = et.Feature("f", 10_000, counts=counts)
    encoding = et.plan([feature], "freqcut", budget, **options).encoding("f")
    assert isinstance(encoding, FreqCut)
    return encoding


def rows_of(encoding: FreqCut, ids: np.ndarray) -> np.ndarray:
    constants = {name: np.array(value) for name, value in encoding.constants().items()}
    return encoding.rows(ids[:, None], constants)[:, 0]


def test_hot_ids_have_rows_of_their_own_and_all_others_stay_behind_them() -> None:
    encoding = cut(None)
    assert (encoding.hot, encoding.num_rows) == (500, 1000)
    rows = rows_of(encoding, np.arange(10_000))
    assert rows[:500].tolist() == list(range(500))
    assert (rows[500:].min(), rows[500:].max()) == (500, 999)
    outside = rows_of(encoding, np.array([-1, 10_000, 2**62, -(2**63), 2**63 - 1]))
    assert ((outside >= 500) & (outside < 1000)).all()


def test_counts_decide_how_many_are_hot() -> None:
    """The fewest colliding pairs of occurrences, against brute force over every number of hot rows."""
    tail = ZIPF[::-1].cumsum()[::-1].astype(float)  # occurrences of id h and of all after it
    best = np.argmin(tail[:1000] ** 2 / (1000 - np.arange(1000)))
    assert abs(cut(ZIPF).hot - best) <= 1000 // 64
    assert 300 < best < 600
    assert cut(np.full(10_000, 7)).hot == 0
    two_levels = np.where(np.arange(10_000) < 100, 1_000_000, 1)
    assert 100 <= cut(two_levels).hot < 100 + 1000 // 64 + 1
    assert cut(ZIPF, hot=0.25).hot == 250


def test_hot_rows_leave_fewer_collisions_than_hashing() -> None:
    """Pairs of occurrences that meet in a row, counted."""

    def meetings(encoding: FreqCut) -> float:
        loads = np.bincount(rows_of(encoding, np.arange(10_000)), weights=ZIPF)
        return float((loads**2).sum() - (ZIPF.astype(float) ** 2).sum())

    assert meetings(cut(ZIPF)) < 0.2 * meetings(cut(ZIPF, hot=0.0))
    assert meetings(cut(ZIPF)) <= meetings(cut(ZIPF, hot=0.8))


def test_ids_that_are_not_in_order_are_refused() -> None:
    shuffled = np.random.default_rng(0).permutation(ZIPF)
    with pytest.raises(UserError, match=r"ids of 'f' are not numbered by falling frequency.*renumber them"):
        cut(shuffled)
    nearly = ZIPF + np.random.default_rng(0).integers(0, 5, 10_000)  # what sampling does to a tail
    assert cut(nearly).hot > 300
    rare_first = np.concatenate([[3], ZIPF[:-1]])  # id 0 stands for all rare values
    assert cut(rare_first).hot > 300


def test_the_smallest_form_is_a_row_that_all_share() -> None:
    assert cut(ZIPF, 64).hot == 0
    with pytest.raises(et.InfeasibleBudget) as caught:
        cut(ZIPF, 63)
    assert caught.value.min_bytes == 64


@pytest.mark.parametrize("hot", [-0.1, 1.0, float("nan")])
def test_shares_that_make_no_sense(hot: float) -> None:
    with pytest.raises(UserError, match="hot must be a share of the rows"):
        cut(ZIPF, hot=hot)
