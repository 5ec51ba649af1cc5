"""Each id of a batch once: ids repeat a lot, and what a vector costs need not be paid again for every repetition.

    ids [N] --distinct--> ids [U] -- any method --> vectors [U, D] --gather--> sums over bags [B, D]

N ids   U distinct ids (of each feature)   B bags

Both directions read rows in the order in which they are needed, by the kernel that sums bags: forward, a bag is a bag
of vectors; backward, the gradient of a distinct id's vector is the sum over the bags that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distinct:
    """The distinct ids of a batch.

    Attributes:
        ids: int64 [U], feature after feature.
        sizes: how many each feature has.
        places: int [N], where each of the batch's ids stands among `ids`.
        order: int [N], the batch's ids sorted by `places`.
        starts: int [U + 1], where each distinct id begins in `order`.
    """

    ids: Tensor
    sizes: list[int]
    places: Tensor
    order: Tensor
    starts: Tensor


def firsts(cardinalities: Tensor) -> Tensor:
    """int64 [F]: the number that ids of each feature are counted from, so that no two features share a number."""
    return cardinalities.cumsum(0) - cardinalities


def distinct(numbers: Tensor, cardinalities: Tensor) -> Distinct:
    """The distinct ids of each feature.

    Args:
        numbers: int64 [N], every id of a batch plus its feature's `firsts`, in any order.
        cardinalities: int64 [F]; ids lie below them.
    """
    ends = cardinalities.cumsum(0)
    total, device = len(numbers), numbers.device
    kind = torch.int32 if total < 2**31 else torch.int64
    ascending, order = _sorted(numbers, int(ends[-1]))
    new = torch.ones(total, dtype=torch.bool, device=device)
    torch.ne(ascending[1:], ascending[:-1], out=new[1:])
    starts = new.nonzero().squeeze(1)
    found = ascending[starts]
    counts = torch.searchsorted(found, ends).diff(prepend=ends.new_zeros(1))
    return Distinct(
        found - firsts(cardinalities).repeat_interleave(counts, output_size=len(found)),
        counts.tolist(),
        torch.empty(total, dtype=kind, device=device).scatter_(0, order, new.cumsum(0, dtype=kind) - 1),
        order.to(kind),
        F.pad(starts, (0, 1), value=total).to(kind),
    )


def _sorted(numbers: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Numbers int64 [N] below `limit` in ascending order, and where each stood."""
    bits = max(len(numbers) - 1, 1).bit_length()
    if numbers.device.type != "cpu" or limit >> (63 - bits):
        ascending, order = numbers.sort()
        return ascending, order
    # Number and position as one number: NumPy sorts these twice as fast as torch sorts and keeps track of positions.
    packed = (numbers << bits).bitwise_or_(torch.arange(len(numbers)))
    packed.numpy().sort()
    return packed >> bits, packed.bitwise_and_((1 << bits) - 1)


def gathered(vectors: Tensor, found: Distinct, offsets: Tensor, bags: Tensor) -> Tensor:
    """[B, D]: the sums over bags of the vectors [U, D] of distinct ids.

    Args:
        vectors: of `found.ids`.
        found: the distinct ids of a batch, whose ids stand bag after bag.
        offsets: int [B + 1], where each bag begins.
        bags: int [N], the bags of the ids in `found.order`.
    """
    kind = found.places.dtype
    sums: Tensor = _Gather.apply(vectors, found.places, offsets.to(kind), bags.to(kind), found.starts)
    return sums


def sums_of_rows(rows: Tensor, matrix: Tensor, offsets: Tensor) -> Tensor:
    """[B, D]: sums of rows of a matrix; bag b holds rows[offsets[b]:offsets[b + 1]]."""
    return F.embedding_bag(rows, matrix, offsets, mode="sum", include_last_offset=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, rows: Tensor, offsets: Tensor, back: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(back, starts)
        return sums_of_rows(rows, vectors.contiguous(), offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back, starts = ctx.saved_tensors
        return sums_of_rows(back, gradient.contiguous(), starts), None, None, None, None
