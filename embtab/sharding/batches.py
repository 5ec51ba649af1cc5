"""What is asked of torchrec: the requests of a batch, taken apart into one feature per slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.lookup import Request

Place = tuple[int, int]
"""A request and one of its slots, by position."""


def slots_of(request: Request) -> Iterator[Request]:
    """One request per slot."""
    sizes, count = list(request.sizes), len(request.slots)
    rows = request.rows.split(sizes)
    lengths = [None] * count if request.lengths is None else request.lengths.view(count, -1).unbind()
    weights = [None] * count if request.weights is None else request.weights.split(sizes)
    for name, row, length, weight, size in zip(request.slots, rows, lengths, weights, sizes, strict=True):
        yield Request(request.width, row, length, weight, (name,), (size,))


def pooled_batch(group: Sequence[tuple[Place, Request]]) -> KeyedJaggedTensor:
    """The bags of some slots."""
    asked = [one for _, one in group]
    weights = None
    if any(one.weights is not None for one in asked):
        weights = torch.cat([torch.ones(len(r.rows), device=r.rows.device) if r.weights is None else r.weights.float()
                             for r in asked])  # fmt: skip
    return KeyedJaggedTensor(
        [one.slots[0] for one in asked],
        torch.cat([one.rows for one in asked]),
        weights=weights,
        lengths=torch.cat([one.lengths for one in asked if one.lengths is not None]),
        length_per_key=[one.sizes[0] for one in asked],
    )


def single_batch(group: Sequence[tuple[Place, Request]]) -> KeyedJaggedTensor:
    """The ids of some slots, as one bag each: bags mean nothing to an EmbeddingCollection."""
    asked = [one for _, one in group]
    sizes = [one.sizes[0] for one in asked]
    return KeyedJaggedTensor(
        [one.slots[0] for one in asked],
        torch.cat([one.rows for one in asked]),
        lengths=torch.tensor(sizes, device=asked[0].rows.device),
        length_per_key=sizes,
        stride=1,
    )


def summed(rows: Tensor, one: Request) -> Tensor:
    """The answer [B, W] to a request of one slot, from the (padded) rows [N, W] of its ids."""
    rows = rows[:, : one.width]
    if one.weights is not None:
        rows = rows * one.weights.unsqueeze(-1)
    if one.lengths is None or (len(rows) == len(one.lengths) and bool((one.lengths == 1).all())):
        return rows
    return torch.segment_reduce(rows, "sum", lengths=one.lengths.long(), axis=0, unsafe=True)


def joined(parts: Sequence[Tensor | None]) -> Tensor:
    """Those that are there, one after the other."""
    whole = [part for part in parts if part is not None]
    return whole[0] if len(whole) == 1 else torch.cat(whole)
