"""Tensor-train cores against NumPy: exact where the table has the rank, never worse than TT-SVD, weights obeyed."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from embtab.convert.tt_svd import fit_cores

P, Q = (5, 4, 6), (2, 2, 4)
N, D = 113, 16  # fewer ids than 5 x 4 x 6
RANDOM = np.random.default_rng(0)


def composed(cores: tuple[torch.Tensor, ...], n: int = N) -> np.ndarray:
    a, b, c = (core.numpy() for core in cores)
    i1, i2, i3 = np.unravel_index(np.arange(n), P)
    return np.einsum("nar,nrbs,nsc->nabc", a[i1], b[i2], c[i3]).reshape(n, D)


def fitted(dense: np.ndarray, weights: np.ndarray, ranks: tuple[int, int], sweeps: int = 10) -> np.ndarray:
    return composed(fit_cores(torch.tensor(dense), torch.tensor(weights), P, Q, ranks, sweeps))


def lost(found: np.ndarray, dense: np.ndarray, weights: np.ndarray) -> float:
    return float((weights[:, None] * (found - dense) ** 2).sum())


def table_of_rank(r: int, s: int) -> np.ndarray:
    shapes = (P[0], Q[0], r), (P[1], r, Q[1], s), (P[2], s, Q[2])
    return composed(tuple(torch.tensor(RANDOM.standard_normal(shape)) for shape in shapes), 120)


def test_a_table_that_has_the_rank_comes_back() -> None:
    dense = table_of_rank(2, 3)
    np.testing.assert_allclose(fitted(dense, np.ones(120), (2, 3), sweeps=0)[:N], dense[:N], atol=1e-9)
    weights = RANDOM.uniform(0.1, 10, N)  # and with some of its rows left out
    assert lost(fitted(dense[:N], weights, (2, 3), sweeps=200), dense[:N], weights) < 1e-4 * lost(
        0 * dense[:N], dense[:N], weights
    )


def test_the_first_cut_is_the_singular_value_decomposition() -> None:
    """With the second rank full, TT-SVD is the truncated SVD of the table folded along its first digit."""
    dense = RANDOM.standard_normal((120, D))
    found = fit_cores(torch.tensor(dense), torch.ones(120), P, Q, (3, 24), 0)
    folded = dense.reshape(*P, *Q).transpose(0, 3, 1, 4, 2, 5).reshape(P[0] * Q[0], -1)
    singular = np.linalg.svd(folded, compute_uv=False)
    assert lost(composed(found, 120), dense, np.ones(120)) == pytest.approx(float((singular[3:] ** 2).sum()), rel=1e-6)


def test_sweeps_lower_the_weighted_error_and_no_core_can_do_better() -> None:
    dense, weights = RANDOM.standard_normal((N, D)), RANDOM.uniform(0.01, 10, N)
    errors = [lost(fitted(dense, weights, (3, 4), sweeps), dense, weights) for sweeps in (0, 1, 2, 5, 20)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    # The last core, row by row, by NumPy's least squares on the others.
    a, b, c = fit_cores(torch.tensor(dense), torch.tensor(weights), P, Q, (3, 4), 20)
    i1, i2, i3 = np.unravel_index(np.arange(N), P)
    left = np.einsum("nar,nrbs->nabs", a.numpy()[i1], b.numpy()[i2]).reshape(N, 4, 4)
    best = 0.0
    for row in range(P[2]):
        mine = i3 == row
        root = np.sqrt(np.repeat(weights[mine], 4))[:, None]
        design, wanted = root * left[mine].reshape(-1, 4), root * dense[mine].reshape(-1, 4)
        x, *_ = np.linalg.lstsq(design, wanted, rcond=None)
        best += float(((design @ x - wanted) ** 2).sum())
    assert errors[-1] == pytest.approx(best, rel=1e-6)
    assert c.shape == (6, 4, 4)


def test_ranks_beyond_the_table_are_harmless() -> None:
    dense = RANDOM.standard_normal((N, D))
    found = fitted(dense, np.ones(N), (40, 40), 2)
    np.testing.assert_allclose(found, dense, atol=1e-5)
