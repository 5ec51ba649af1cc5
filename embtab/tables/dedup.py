"""Each id of a batch once: ids repeat a lot, and what a vector costs need not be paid again for every repetition.

    ids [N] --distinct--> ids [U] -- any method --> vectors [U, D] --gather--> sums over bags [B, D]

N ids   U distinct ids (of each feature)   B bags

On CPUs only: here ids are found by marks on a list of all ids, feature by feature, so that everything stays in the
cache; the gradient of the vectors is the product of a sparse matrix (which bag holds which id) and that of the sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SPARSE = 64
"""All ids for each one of a batch from which on sorting is quicker than marks."""


def distinct(ids: NDArray[np.int64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The distinct ones of the ids of a feature, ascending.

    Args:
        ids: int64 [N] in [0, limit).
        limit: above all of them.

    Returns:
        The distinct ids int64 [U], and where each id stands among them, int32 [N].
    """
    if limit > SPARSE * len(ids):
        found, places = np.unique(ids, return_inverse=True)
        return found, places.astype(np.int32)
    marks = np.zeros(limit, dtype=bool)
    marks[ids] = True
    found = np.flatnonzero(marks)
    place = np.empty(limit, dtype=np.int32)
    place[found] = np.arange(len(found), dtype=np.int32)
    return found, place[ids]


def gathered(vectors: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """[B, D]: the sums over bags of the vectors [U, D] of distinct ids, of the vectors' own type.

    Args:
        vectors: of the distinct ids; those of 16 bits are summed in float32.
        places: int32 [N], where each id stands among them, bag after bag.
        offsets: int32 [B + 1], where each bag begins.
    """
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    sums: Tensor = _Gather.apply(wide, places, offsets)
    return sums.to(vectors.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(places, offsets)
        ctx.count = len(vectors)
        return F.embedding_bag(places, vectors.contiguous(), offsets, mode="sum", include_last_offset=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from scipy.sparse import csr_array

        places, offsets, above = (tensor.numpy() for tensor in (*ctx.saved_tensors, gradient))
        holds = csr_array((np.ones(len(places), above.dtype), places, offsets), shape=(len(above), ctx.count))
        return torch.from_numpy(holds.T @ above), None, None
