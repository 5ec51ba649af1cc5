"""Ways from the ids of a block to its vectors: the same results, each the quickest for some batches.

    `PerBag`    any batch. Linear methods: bags of parts are summed by the lookup, and combined; the others: per id.
    `OneEach`   one id in every bag: rows are asked for in the order of the vectors, so nothing has to be moved.
    `PerDistinctId`  several parts an id, or ids combined one by one: each distinct id is computed once.

N ids of a block   F features of a block   B bags per feature   K parts per id   W width of a part   D dimension
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.blocks import Piece, per_bag
from embtab.distinct import distinct, firsts, gathered
from embtab.lookup import Request

DISTINCT_FROM = 4096
"""Ids in a block from which on finding the distinct ones pays."""


class Way(ABC):
    """What the lookup is asked for, and what is made of its answers."""

    requests: Sequence[Request]

    @abstractmethod
    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D] (not yet divided for features that pool by mean)."""


@dataclass(frozen=True)
class Shape:
    """What is known of a batch: B, and the number of ids in every bag where it is the same for all of them."""

    stride: int
    bag: int | None

    @classmethod
    def of(cls, lengths: Tensor, stride: int, total: int) -> Shape:
        """Of bag lengths [F * B] that add up to `total`."""
        bag, rest = divmod(total, len(lengths)) if len(lengths) else (0, 1)
        same = not rest and bag > 0 and bool((lengths == bag).all())
        return cls(stride, bag if same else None)


def way_of(piece: Piece, shape: Shape, pools: bool, stacked: bool) -> Way:
    """The way for a block of a batch.

    Args:
        piece: the block with its ids, bag lengths, weights and sizes.
        shape: of the batch.
        pools: whether the lookup may sum bags of parts.
        stacked: whether the lookup takes rows in any order (one that shards tables wants them feature by feature).
    """
    block, ids, _, weights, sizes = piece
    if stacked and weights is None:
        alone = pools and len(block.widths) == 1
        if not alone and len(ids) >= DISTINCT_FROM and not block.encoding.adaptive and block.are_numbers(ids, sizes):
            return PerDistinctId(piece, shape)
        if shape.bag == 1 and not block.encoding.may_skip and block.widths:
            return OneEach(piece, shape)
    return PerBag(piece, shape, pools)


class PerBag(Way):
    """For every batch."""

    def __init__(self, piece: Piece, shape: Shape, pools: bool) -> None:
        self.block, ids, self.lengths, self.weights, sizes = piece
        self.shape, self.pools = shape, pools
        self.rows = self.block.rows(ids, sizes)
        bags = (self.lengths, self.weights) if pools else (None, None)
        self.requests = self.block.requests(self.rows, sizes, *bags)

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D]."""
        if self.pools:
            return self.block.combine(self.rows, answers, self.shape.stride)
        each = self.block.combine(self.rows, answers, None)
        return per_bag(self.block.pool(each, self.lengths, self.weights), self.shape.stride)


class OneEach(Way):
    """For bags of one id, whose vectors are those of the ids."""

    def __init__(self, piece: Piece, shape: Shape) -> None:
        self.block, ids, _, _, _ = piece
        self.shape = shape
        rows = self.block.rows_of_rows(ids, shape.stride)
        widths = set(self.block.widths)
        asked = [rows] if len(widths) == 1 else rows.unbind(-1)
        self.requests = [
            Request(width, part.flatten(), None) for width, part in zip(self.block.widths, asked, strict=False)
        ]

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """The ids' vectors [B, F, D]."""
        shape = (self.shape.stride, len(self.block.features))
        found = [next(answers) for _ in self.requests]
        if len(found) < len(self.block.widths):
            parts: Sequence[Tensor] = found[0].view(*shape, len(self.block.widths), -1).unbind(2)
        else:
            parts = [part.view(*shape, -1) for part in found]
        return self.block.encoding.combine(parts, self.block.arrays)


class PerDistinctId(Way):
    """For vectors that cost more than a row."""

    def __init__(self, piece: Piece, shape: Shape) -> None:
        self.block, ids, self.lengths, _, sizes = piece
        self.shape, self.total = shape, len(ids)
        self.found = distinct(self._in_order(ids, sizes), self.block.cardinalities)
        self.rows = self.block.rows(self.found.ids, self.found.sizes)
        self.requests = self.block.requests(self.rows, self.found.sizes, None, None)

    def _in_order(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """Numbers of ids in the order of the vectors, where bags are alike; else feature after feature."""
        starts = firsts(self.block.cardinalities)
        if self.shape.bag is None:
            counts = torch.tensor(sizes, device=ids.device)
            return ids + starts.repeat_interleave(counts, output_size=len(ids))
        numbers = ids.view(len(sizes), self.shape.stride, -1) + starts.view(-1, 1, 1)
        return numbers.transpose(0, 1).flatten()

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D]."""
        each = self.block.combine(self.rows, answers, None)
        bag, order, device = self.shape.bag, self.found.order, each.device
        if bag is None:
            lengths = self.lengths.long()
            bags = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=self.total)
            sums = gathered(each, self.found, F.pad(lengths.cumsum(0), (1, 0)), bags[order])
            return per_bag(sums, self.shape.stride)
        offsets = torch.arange(0, self.total + 1, bag, dtype=torch.int32, device=device)
        sums = gathered(each, self.found, offsets, order if bag == 1 else order // bag)
        return sums.view(self.shape.stride, len(self.block.features), -1)
