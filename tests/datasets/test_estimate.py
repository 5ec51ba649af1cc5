"""The number of different ids is estimated as closely as the theory says, in whatever pieces they come."""

import numpy as np
import pytest

from embtab.datasets.estimate import Distinct


@pytest.mark.parametrize("different", [0, 1, 100, 4095, 5000, 100_000, 3_000_000])
def test_close_to_the_truth(different):
    distinct = Distinct()
    ids = np.arange(different, dtype=np.int64) * 3 - different
    for piece in np.array_split(np.concatenate([ids, ids[: different // 2]]), 7):
        distinct.add(piece)
    if different < 4096:
        assert distinct.count == max(different, 1)
    assert distinct.count == pytest.approx(max(different, 1), rel=0.05)  # three standard errors


def test_pieces_and_order_do_not_matter():
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**63), 2**63, 50_000)
    counts = set()
    for pieces in (1, 3, 50):
        distinct = Distinct()
        for piece in np.array_split(rng.permutation(np.concatenate([ids, ids])), pieces):
            distinct.add(piece)
        counts.add(distinct.count)
    assert len(counts) == 1
