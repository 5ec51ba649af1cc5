"""Ways from the ids of a batch to its vectors: the same results, each the quickest for some batches and methods.

    `Bare`           vectors that are a row as it stands: all such features are one request; and where every bag has one
                     id, in the order of the vectors, so that nothing has to be moved.
    `OneEach`        one id in every bag, a block of any method.
    `PerDistinctId`  several parts an id, or ids combined one by one, on a CPU: each distinct id is computed once.
    `JoinedRows`     a lookup that makes vectors of rows itself: any batch, of methods that join rows in a plain way.
    `PerBag`         any batch. Linear methods: the lookup sums bags of parts, which are combined; the others: per id.

N ids   F features   B bags per feature   K parts per id   W width of a part   D dimension
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embtab.lookup.base import Joined, Lookup, Request
from embtab.lookup.stacked import StackedLookup
from embtab.methods.base import Encoding
from embtab.tables.batch import Cut
from embtab.tables.blocks import Block, per_bag
from embtab.tables.dedup import distinct, gathered

DISTINCT_FROM = 4096
"""Ids in a batch from which on finding the distinct ones pays."""


class Way(ABC):
    """What the lookup is asked for some features, and what is made of its answers.

    Attributes:
        places: of the F features in the plan.
        requests: to the lookup.
    """

    places: list[int]
    requests: Sequence[Request]

    @abstractmethod
    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D] (not yet divided for features that pool by mean)."""


def ways_of(cut: Cut, blocks: Sequence[Block], pools: Callable[[Encoding], bool], lookup: Lookup) -> list[Way]:
    """The ways of a batch; together they have every feature once.

    Args:
        cut: the batch.
        blocks: of the collection.
        pools: whether the lookup may sum bags of an encoding's parts.
        lookup: who will be asked; one that shards tables wants rows feature by feature.

    Raises:
        UserError: when an id is out of range.
    """
    for block in blocks:
        block.check(cut)
    joined = [block for block in blocks if joins(lookup, block)]
    blocks = [block for block in blocks if block not in joined]
    ways: list[Way] = [JoinedRows(some, cut, lookup) for some in alike(joined)]
    if not isinstance(lookup, StackedLookup) or cut.weighted:
        return ways + [PerBag(block, cut, pools(block.encoding)) for block in blocks]
    able = once(cut, blocks, lookup)
    if any(len(block.widths) != 1 or not pools(block.encoding) for block in able):
        ways.append(PerDistinctId(able, cut))
        blocks = [block for block in blocks if block not in able]
    if bare := [block for block in blocks if block.encoding.bare]:
        ways.append(Bare(bare, cut, lookup))
        blocks = [block for block in blocks if not block.encoding.bare]
    each = [block for block in blocks if cut.bag == 1 and block.widths and not block.encoding.may_skip]
    ways += [OneEach(block, cut, lookup) for block in each]
    return ways + [PerBag(block, cut, pools(block.encoding)) for block in blocks if block not in each]


def once(cut: Cut, blocks: Sequence[Block], lookup: Lookup) -> list[Block]:
    """The blocks whose distinct ids can be computed once each; none on a GPU, and for few ids."""
    if not isinstance(lookup, StackedLookup) or len(cut.ids) < DISTINCT_FROM or cut.ids.is_cuda:
        return []
    return [block for block in blocks if not block.encoding.adaptive and block.are_numbers(cut)]


def joins(lookup: Lookup, block: Block) -> bool:
    """Whether a lookup makes a block's vectors of its rows."""
    return lookup.joins and not block.encoding.may_skip and block.encoding.joining is not None


def alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks grouped by the widths of their rows and vectors."""
    grouped: dict[tuple[int, int], list[Block]] = {}
    for block in blocks:
        grouped.setdefault((block.widths[0], block.encoding.dim), []).append(block)
    return list(grouped.values())


class JoinedRows(Way):
    """For a lookup that makes vectors itself; any bags, weighted or not.

    Args:
        blocks: whose rows have one width, and whose vectors have one.
        cut: the batch.
        lookup: who will be asked.
        pooled: whether sums over bags are wanted; else the vector of every id, of one block.
    """

    def __init__(self, blocks: Sequence[Block], cut: Cut, lookup: Lookup, pooled: bool = True) -> None:
        self.places = sorted(place for block in blocks for place in block.places)
        self.requests = []
        bags, columns = (cut.stride, len(self.places)) if pooled else (sum(cut.sizes_of(self.places)), 1)
        target = (bags, columns, blocks[0].encoding.dim)
        for block in blocks:
            rows = block.placed_rows(cut.ids_of(block.places), cut.sizes_of(block.places), lookup)
            lengths = cut.lengths_of(block.places) if pooled and cut.bag != 1 else None
            weights = cut.weights_of(block.places) if pooled else None
            among = _columns(tuple(block.places), tuple(self.places)) if pooled else torch.tensor([0])
            joined = Joined(str(block.encoding.joining), among, target)
            self.requests.append(Request(block.widths[0], rows, lengths, weights, joined=joined))

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D]."""
        together, *_ = [next(answers) for _ in self.requests]  # all the same
        return together

    def each(self, answers: Iterator[Tensor]) -> Tensor:
        """The vector of every id [N, D], feature after feature, where they are not pooled."""
        return self.vectors(answers).squeeze(1)


@lru_cache(1024)
def _columns(places: tuple[int, ...], among: tuple[int, ...]) -> Tensor:
    """int64 [F]: where places stand among others; batch after batch asks for the same."""
    return torch.tensor([among.index(place) for place in places])


class Bare(Way):
    """For vectors that are rows: all such features are one request."""

    def __init__(self, blocks: Sequence[Block], cut: Cut, lookup: Lookup) -> None:
        self.stride, self.each = cut.stride, cut.bag == 1
        self.places = sorted(place for block in blocks for place in block.places)
        rows: dict[int, Tensor] = {}
        for block in blocks:
            sizes = cut.sizes_of(block.places)
            placed = block.placed_rows(cut.ids_of(block.places), sizes, lookup).flatten()
            rows |= zip(block.places, placed.split(sizes), strict=True)
        together = placed if len(blocks) == 1 else torch.cat([rows[place] for place in self.places])
        if self.each:
            asked, lengths = together.view(len(self.places), -1).t().flatten(), None
        else:
            asked, lengths = together, cut.lengths_of(self.places)
        self.requests = [Request(blocks[0].widths[0], asked, lengths)]

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums of rows [B, F, D]."""
        sums = next(answers)
        return (
            sums.view(self.stride, len(self.places), sums.shape[1])
            if self.each
            else per_bag(sums, len(self.places), self.stride)
        )


class OneEach(Way):
    """For bags of one id, whose vectors are those of the ids."""

    def __init__(self, block: Block, cut: Cut, lookup: Lookup) -> None:
        self.block, self.places, self.stride = block, block.places, cut.stride
        rows = block.placed_rows(cut.ids_of(block.places), cut.sizes_of(block.places), lookup)
        rows = rows.view(-1, len(block.places), cut.stride).permute(2, 1, 0)
        asked = [rows] if len(set(block.widths)) == 1 else rows.unbind(-1)
        self.requests = [Request(width, part.flatten(), None) for width, part in zip(block.widths, asked, strict=False)]

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """The ids' vectors [B, F, D]."""
        encoding = self.block.encoding
        shape = (self.stride, len(self.places), -1)
        if len(self.requests) < len(self.block.widths):
            together = next(answers).unflatten(0, shape)
            if encoding.joining == "concat":
                return together.flatten(2)
            return encoding.combine(together.unbind(2), self.block.arrays)
        return encoding.combine([next(answers).unflatten(0, shape[:2]) for _ in self.requests], self.block.arrays)


class PerDistinctId(Way):
    """For vectors that cost more than a row; where a batch has any, all features that can go this way do."""

    def __init__(self, blocks: Sequence[Block], cut: Cut, pooled: bool = True) -> None:
        self.blocks, self.cut = blocks, cut
        self.places = sorted(place for block in blocks for place in block.places)
        ids = cut.ids_of(self.places).numpy()
        ends = dict(zip(self.places, accumulate(cut.sizes_of(self.places)), strict=True))
        # Where each id of the batch stands among the distinct ones; bag after bag, where alike bags are pooled.
        self.at = np.empty(len(ids), dtype=np.int32)
        by_feature = self.at.reshape(cut.stride, len(self.places), cut.bag) if pooled and cut.bag else None
        self.rows: list[Tensor] = []
        self.requests = []
        count = 0
        for block in blocks:
            found: list[NDArray[np.int64]] = []
            for place, feature in zip(block.places, block.features, strict=True):
                here = slice(ends[place] - cut.sizes[place], ends[place])
                each, at = distinct(ids[here], feature.num_ids)
                if by_feature is None:
                    self.at[here] = at + count
                else:
                    by_feature[:, self.places.index(place)] = (at + count).reshape(cut.stride, -1)
                found.append(each)
                count += len(each)
            sizes = [len(each) for each in found]
            self.rows.append(block.rows(torch.from_numpy(np.concatenate(found)), sizes))
            self.requests += block.requests(self.rows[-1], sizes, None, None)

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D]."""
        bag, stride = self.cut.bag, self.cut.stride
        if bag is None:
            offsets = F.pad(self.cut.lengths_of(self.places).cumsum(0, dtype=torch.int32), (1, 0))
            return per_bag(self._sums(answers, offsets), len(self.places), stride)
        offsets = torch.arange(0, len(self.at) + 1, bag, dtype=torch.int32)
        return self._sums(answers, offsets).view(stride, len(self.places), -1)

    def each(self, answers: Iterator[Tensor]) -> Tensor:
        """The vector of every id [N, D], feature after feature, where it was asked for without pooling."""
        return self._sums(answers, torch.arange(len(self.at) + 1, dtype=torch.int32))

    def _sums(self, answers: Iterator[Tensor], offsets: Tensor) -> Tensor:
        each = [block.combine(rows, answers, None) for block, rows in zip(self.blocks, self.rows, strict=True)]
        vectors = each[0] if len(each) == 1 else torch.cat(each)
        return gathered(vectors, torch.from_numpy(self.at), offsets)


class PerBag(Way):
    """For every batch."""

    def __init__(self, block: Block, cut: Cut, pools: bool) -> None:
        self.block, self.places, self.stride, self.pools = block, block.places, cut.stride, pools
        self.lengths, self.weights = cut.lengths_of(block.places), cut.weights_of(block.places)
        sizes = cut.sizes_of(block.places)
        self.rows = block.rows(cut.ids_of(block.places), sizes)
        self.requests = block.requests(self.rows, sizes, *((self.lengths, self.weights) if pools else (None, None)))

    def vectors(self, answers: Iterator[Tensor]) -> Tensor:
        """Sums over bags [B, F, D]."""
        if self.pools:
            return self.block.combine(self.rows, answers, self.stride)
        each = self.block.combine(self.rows, answers, None)
        return per_bag(self.block.pool(each, self.lengths, self.weights), len(self.places), self.stride)
