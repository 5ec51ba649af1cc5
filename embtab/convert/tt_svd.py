"""Tensor-train cores of a dense table: TT-SVD (Oseledets, SIAM J. Sci. Comput. 2011, algorithm 1), then alternating
least squares with the ids' weights.

    E[(i1 i2 i3), (a b c)] ~ sum over r, s of  A[i1, a, r] B[i2, r, b, s] C[i3, s, c]

TT-SVD is the best start there is, but every id counts alike in it. Given two cores, the third is the answer to least
squares, a system of its own for each of its rows, whose matrices are sums of products of small ones; so a sweep costs
about what reading the table costs, and the weighted error never rises.

    p1 p2 p3 rows of the cores   q1 q2 q3 factors of D   r, s ranks
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

SWEEPS = 10
Cores = tuple[Tensor, Tensor, Tensor]


def fit_cores(
    dense: Tensor,
    weights: Tensor,
    p: tuple[int, int, int],
    q: tuple[int, int, int],
    ranks: tuple[int, int],
    sweeps: int = SWEEPS,
) -> Cores:
    """Cores float64 [p1, q1, r], [p2, r, q2, s], [p3, s, q3] of equal sizes.

    Args:
        dense: float [n, D], n <= p1 p2 p3.
        weights: float [n], positive.
        p: rows of the cores; an id is (i1 * p2 + i2) * p3 + i3.
        q: factors of D.
        ranks: r and s.
        sweeps: of least squares; 0 for TT-SVD alone.
    """
    n, dim = dense.shape
    grid = dense.new_zeros(p[0] * p[1] * p[2], dim, dtype=torch.float64)
    grid[:n] = dense
    counts = dense.new_zeros(len(grid), dtype=torch.float64)
    counts[:n] = weights
    table = grid.view(*p, *q)
    cores = tt_svd(table, ranks)
    heavy = (grid * counts.unsqueeze(1)).view(*p, *q)
    for _ in tqdm(range(sweeps), desc="fitting cores", unit="sweep", leave=False):
        for k in range(3):
            cores = _solved(k, cores, heavy, counts.view(*p))
    return _balanced(cores)


def tt_svd(table: Tensor, ranks: tuple[int, int]) -> Cores:
    """The cores of a table [p1, p2, p3, q1, q2, q3]; missing ranks are zeros."""
    p1, p2, p3, q1, q2, q3 = table.shape
    r, s = ranks
    flat = table.permute(0, 3, 1, 4, 2, 5).reshape(p1 * q1, p2 * q2 * p3 * q3)
    left, rest = _truncated(flat, r)
    middle, right = _truncated(rest.reshape(r * p2 * q2, p3 * q3), s)
    return (
        left.view(p1, q1, r),
        middle.view(r, p2, q2, s).permute(1, 0, 2, 3).contiguous(),
        right.view(s, p3, q3).permute(1, 0, 2).contiguous(),
    )


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal [m, rank] and the rest [rank, n] of a matrix [m, n], by the Gram matrix of its shorter side."""
    m, n = matrix.shape
    kept = min(rank, m, n)
    if m <= n:
        left = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors.flip(1)[:, :kept]
    else:
        right = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors.flip(1)[:, :kept]
        left = torch.linalg.qr(matrix @ right).Q
    left = torch.nn.functional.pad(left, (0, rank - kept))
    return left, left.t() @ matrix


def _solved(k: int, cores: Cores, heavy: Tensor, counts: Tensor) -> Cores:
    """The cores with the k-th the weighted least-squares answer to the others.

    Args:
        k: 0, 1 or 2.
        cores: of now.
        heavy: [p1, p2, p3, q1, q2, q3], the table times its weights.
        counts: [p1, p2, p3], the weights.
    """
    a, b, c = cores
    aa, cc = torch.einsum("iar,iaR->irR", a, a), torch.einsum("ksc,kSc->ksS", c, c)
    if k == 0:
        around = torch.einsum("ijk,ksS->ijsS", counts, cc)
        left = torch.einsum("jrbs,ijsS->ijrbS", b, around)
        system = torch.einsum("ijrbS,jRbS->irR", left, b)
        answer = torch.einsum("ijabs,jrbs->ira", torch.einsum("ijkabc,ksc->ijabs", heavy, c), b)
        return _solve(system, answer).transpose(1, 2).contiguous(), b, c
    if k == 1:
        r, s = a.shape[2], c.shape[1]
        around = torch.einsum("ijk,ksS->ijsS", counts, cc)
        system = torch.einsum("irR,ijsS->jrsRS", aa, around).reshape(len(b), r * s, r * s)
        answer = torch.einsum("iar,ijabs->jrsb", a, torch.einsum("ijkabc,ksc->ijabs", heavy, c))
        solved = _solve(system, answer.reshape(len(b), r * s, -1)).view(len(b), r, s, -1)
        return a, solved.permute(0, 1, 3, 2).contiguous(), c
    around = torch.einsum("ijk,irR->jkrR", counts, aa)
    left = torch.einsum("jrbs,jkrR->jkbsR", b, around)
    system = torch.einsum("jkbsR,jRbS->ksS", left, b)
    answer = torch.einsum("jrbs,jkrbc->ksc", b, torch.einsum("iar,ijkabc->jkrbc", a, heavy))
    return a, b, _solve(system, answer)


def _solve(system: Tensor, answer: Tensor) -> Tensor:
    """The x [N, m, l] of system [N, m, m] x = answer [N, m, l]; a little ridge where the system is singular."""
    ridge = 1e-9 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    eye = torch.eye(system.shape[1], dtype=system.dtype)
    found: Tensor = torch.linalg.solve(system + ridge.view(-1, 1, 1) * eye, answer)
    return found


def _balanced(cores: Cores) -> Cores:
    """The same product of cores whose numbers have equal sizes, so that none loses more to a coarse precision."""
    sizes = [float(core.square().mean().sqrt()) or 1.0 for core in cores]
    common = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
    a, b, c = (core * (common / size) for core, size in zip(cores, sizes, strict=True))
    return a, b, c
