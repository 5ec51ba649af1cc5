"""Rows to their events and back, by the kernel that sums bags: a row's events are a bag of neighbours.

b rows, n events of all rows together, e width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.models.events import owner, segment_sum


def spread(rows_be: Tensor, lengths_b: Tensor, total: int) -> Tensor:
    """Each row once for each of its events: float [B, E] -> [N, E], N = `total`.

    The gradient of indexing, `rows[owner]`, adds the events one by one; here it is a sum over bags.
    """
    if not _has_kernel(rows_be):
        return rows_be[owner(lengths_b, total)]
    spread_ne: Tensor = _Spread.apply(rows_be, lengths_b, total)
    return spread_ne


def weighted_sum(values_ne: Tensor, weights_n: Tensor, lengths_b: Tensor) -> Tensor:
    """Sums over segments of values [N, E] times their weights [N]: [B, E]; zero for an empty one."""
    if not _has_kernel(values_ne) or weights_n.dtype != torch.float32:
        return segment_sum(weights_n.unsqueeze(1) * values_ne, lengths_b)
    sums_be: Tensor = _WeightedSum.apply(values_ne, weights_n, lengths_b)
    return sums_be


def _has_kernel(values: Tensor) -> bool:
    return values.dtype == torch.float32 and not torch.compiler.is_compiling()


def _sums(values_ne: Tensor, lengths_b: Tensor, weights_n: Tensor | None = None) -> Tensor:
    offsets = F.pad(lengths_b.cumsum(0), (1, 0))
    rows = torch.arange(len(values_ne), device=values_ne.device)
    values_ne = values_ne.contiguous()
    return F.embedding_bag(rows, values_ne, offsets, mode="sum", per_sample_weights=weights_n, include_last_offset=True)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_be: Tensor, lengths_b: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(lengths_b)
        return rows_be.index_select(0, owner(lengths_b, total))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_ne: Tensor) -> tuple[Tensor | None, ...]:
        return _sums(gradient_ne, ctx.saved_tensors[0]), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_ne: Tensor, weights_n: Tensor, lengths_b: Tensor) -> Tensor:
        ctx.save_for_backward(values_ne, weights_n, lengths_b)
        return _sums(values_ne, lengths_b, weights_n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_be: Tensor) -> tuple[Tensor | None, ...]:
        values_ne, weights_n, lengths_b = ctx.saved_tensors
        gradient_ne = gradient_be.index_select(0, owner(lengths_b, len(values_ne)))
        of_weights = torch.linalg.vecdot(gradient_ne, values_ne)
        return gradient_ne.mul_(weights_n.unsqueeze(1)), of_weights, None
