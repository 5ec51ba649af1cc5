"""What is asked of torchrec: the requests of a batch, taken apart into one feature per slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.fused import Optimizer
from embtab.lookup.base import Request
from embtab.lookup.fbgemm import without_padding

Place = tuple[int, int]
"""A request and one of its slots, by position."""


Asked = tuple[Place, Request]


@dataclass
class Questions:
    """The requests of a batch by who answers them, slot by slot.

    Attributes:
        counts: the slots of each request.
        here: those whose tables this process holds in full.
        away: the others, by torchrec's collection.
    """

    counts: list[int]
    here: list[Asked]
    away: dict[str, list[Asked]]

    def batches(self) -> dict[str, KeyedJaggedTensor]:
        """What each of torchrec's collections is asked."""
        return {name: pooled_batch(group) if name.startswith("bags") else single_batch(group)
                for name, group in self.away.items()}  # fmt: skip

    def answers(self, here: Sequence[Tensor], found: Mapping[str, Any], settings: Optimizer) -> list[Tensor]:
        """The answer to each request.

        Args:
            here: from this process.
            found: from torchrec's collections, by name, in rows padded to a multiple of four.
            settings: of the tables' optimizer.
        """
        slots: list[dict[int, Tensor]] = [{} for _ in self.counts]
        for ((i, j), _), answer in zip(self.here, here, strict=True):
            slots[i][j] = answer
        for name, group in self.away.items():
            # By key: the order of the answer depends on how the tables are spread.
            pooled = name.startswith("bags")
            rows = found[name].to_dict() if pooled else found[name]
            for (i, j), one in group:
                values = rows[one.slots[0]] if pooled else rows[one.slots[0]].values()
                values = without_padding(values, one.width, settings)
                slots[i][j] = values if pooled else summed(values, one)
        return [joined([parts[j] for j in range(count)]) for parts, count in zip(slots, self.counts, strict=True)]


def slots_of(request: Request) -> Iterator[Request]:
    """One request per slot."""
    sizes, count = list(request.sizes), len(request.slots)
    rows = request.rows.split(sizes)
    lengths = [None] * count if request.lengths is None else request.lengths.view(count, -1).unbind()
    weights = [None] * count if request.weights is None else request.weights.split(sizes)
    for name, row, length, weight, size in zip(request.slots, rows, lengths, weights, sizes, strict=True):
        yield Request(request.width, row, length, weight, (name,), (size,))


def pooled_batch(group: Sequence[Asked]) -> KeyedJaggedTensor:
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


def single_batch(group: Sequence[Asked]) -> KeyedJaggedTensor:
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
    """The answer [B, W] to a request of one slot, from the rows [N, W] of its ids."""
    if one.weights is not None:
        rows = rows * one.weights.unsqueeze(-1)
    if one.lengths is None or (len(rows) == len(one.lengths) and bool((one.lengths == 1).all())):
        return rows
    return torch.segment_reduce(rows, "sum", lengths=one.lengths.long(), axis=0, unsafe=True)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
