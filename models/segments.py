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


def row_products(values_ne: Tensor, matrices_beh: Tensor, lengths_b: Tensor) -> Tensor:
    """The product of each event [E] and the matrix [E, H] of its row: float [N, E] -> [N, H]."""
    products_nh: Tensor = _RowProducts.apply(values_ne.contiguous(), matrices_beh, lengths_b)
    return products_nh


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


class _RowProducts(torch.autograd.Function):
    """Row by row into one result: histories are of any length, and nothing is padded."""

    @staticmethod
    def forward(ctx: Any, values_ne: Tensor, matrices_beh: Tensor, lengths_b: Tensor) -> Tensor:
        ctx.save_for_backward(values_ne, matrices_beh)
        ctx.lengths = lengths_b.tolist()
        products_nh = values_ne.new_empty(len(values_ne), matrices_beh.shape[2])
        each = zip(values_ne.split(ctx.lengths), matrices_beh, products_nh.split(ctx.lengths), strict=True)
        for values_le, matrix_eh, product_lh in each:
            torch.mm(values_le, matrix_eh, out=product_lh)
        return products_nh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_nh: Tensor) -> tuple[Tensor | None, ...]:
        values_ne, matrices_beh = ctx.saved_tensors
        of_values_ne, of_matrices_beh = torch.empty_like(values_ne), torch.empty_like(matrices_beh)
        parts = (each.split(ctx.lengths) for each in (gradient_nh.contiguous(), values_ne, of_values_ne))
        for gradient_lh, values_le, of_values_le, matrix_eh, of_matrix_eh in zip(
            *parts, matrices_beh, of_matrices_beh, strict=True
        ):
            torch.mm(gradient_lh, matrix_eh.t(), out=of_values_le)
            torch.mm(values_le.t(), gradient_lh, out=of_matrix_eh)
        return of_values_ne, of_matrices_beh, None
