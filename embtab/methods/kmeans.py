"""Lloyd's k-means, small and seeded: for methods that cluster their own vectors while they train.

N points   k centroids   W width
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAMPLES_PER_CENTROID = 64
ITERATIONS = 10
_CELLS = 2**22  # distances held at a time


def kmeans(points: Tensor, k: int, generator: np.random.Generator) -> Tensor:
    """Centroids [k, W] of points [N, W], by `ITERATIONS` rounds of Lloyd's algorithm from k distinct points.

    At most `SAMPLES_PER_CENTROID * k` points are looked at, sampled without replacement. Where these have no more than
    k distinct values, the values themselves are the centroids (some of them repeated), so nothing is lost.
    """
    most = SAMPLES_PER_CENTROID * k
    if len(points) > most:
        chosen = np.sort(generator.choice(len(points), most, replace=False, shuffle=False))
        points = points[torch.from_numpy(chosen).to(points.device)]
    distinct = torch.unique(points, dim=0)
    if len(distinct) <= k:
        return distinct[torch.arange(k, device=points.device) % len(distinct)]
    chosen = generator.choice(len(distinct), k, replace=False)
    centroids = distinct[torch.from_numpy(chosen).to(points.device)]
    for _ in range(ITERATIONS):
        means, sizes = group_means(points, nearest(points, centroids), k)
        centroids = torch.where(sizes.unsqueeze(1) > 0, means, centroids)
    return centroids


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """int64 [N]: the centroid of [k, W] that is closest to each point of [N, W]; the first of equals."""
    norms = (centroids * centroids).sum(1)
    blocks = points.split(max(_CELLS // len(centroids), 1))
    return torch.cat([torch.addmm(norms, block, centroids.t(), alpha=-2).argmin(1) for block in blocks])


def group_means(points: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The mean [k, W] of the points [N, W] of each group (zeros for an empty one), and the groups' sizes [k].

    Args:
        points: float [N, W].
        groups: int64 [N], in [0, k).
        k: how many groups there are.
    """
    sums = points.new_zeros(k, points.shape[1]).index_add_(0, groups, points)
    sizes = torch.bincount(groups, minlength=k)
    return sums / sizes.clamp(min=1).unsqueeze(1), sizes
