"""What sequence models receive: a target and the events before it, ragged; and sums over ragged events.

Every sequence model is called as `model(dense, others, events)`:

    dense [B, N]      numeric values
    others [B, C, D]  vectors of what is neither target nor history, such as the user; pooled
    events            `Events`: the target's vectors and the history's

and gives logits [B]. Histories come as one long tensor with their lengths: no padding exists that could leak.

Shape suffixes: b rows, n events of all rows together, l the longest history, f fields of an event (item, category,
position), d width of a field, e = f * d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """The vectors of B targets and of the events before them.

    Attributes:
        target: float [B, F, D], a vector per field; the field of the position comes last.
        history: float [N, F, D], the same of each event; the history of row 0 first, oldest event first.
        lengths: int64 [B], events of each row; may be 0.
    """

    target: Tensor
    history: Tensor
    lengths: Tensor

    @property
    def owner(self) -> Tensor:
        """int64 [N]: the row that each event belongs to."""
        return owner(self.lengths, self.history.shape[0])

    def kept(self, mask: Tensor) -> Events:
        """Only the events of a bool [N] mask."""
        return Events(self.target, self.history[mask], count(mask, self.lengths))


def owner(lengths: Tensor, total: int) -> Tensor:
    """int64 [N]: the segment of each of the N = `total` elements of segments of the given lengths."""
    if torch.compiler.is_exporting():  # into operators that every runtime has
        ends = lengths.cumsum(0)
        marks = torch.zeros(total + 1, dtype=torch.int64, device=lengths.device)
        return marks.scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:-1]
    rows = torch.arange(len(lengths), device=lengths.device)
    return rows.repeat_interleave(lengths, output_size=total)


def count(mask: Tensor, lengths: Tensor) -> Tensor:
    """int64 [B]: how many elements of each segment a bool [N] mask holds."""
    return torch.zeros_like(lengths).index_add_(0, owner(lengths, len(mask)), mask.to(lengths.dtype))


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of float [N, ...] over segments: [B, ...]; zero for an empty one."""
    if torch.compiler.is_exporting():
        sums = values.new_zeros(lengths.shape[0], *values.shape[1:])
        return sums.index_put((owner(lengths, values.shape[0]),), values, accumulate=True)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def segment_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    """Float [N] -> [N]: positive weights that add up to 1 in each segment."""
    rows = owner(lengths, scores.shape[0])
    if torch.compiler.is_exporting():
        lowest = scores.new_full((lengths.shape[0],), float("-inf"))
        largest = lowest.scatter_reduce(0, rows, scores, "amax")
    else:
        largest = torch.segment_reduce(scores.detach(), "max", lengths=lengths, unsafe=True)
    powers = (scores - largest[rows]).exp()
    return powers / segment_sum(powers, lengths)[rows]


def padded(values: Tensor, lengths: Tensor, fill: float) -> Tensor:
    """Float [N] as [B, L], filled up at the end of each row."""
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    there = steps < lengths.unsqueeze(1)
    return values.new_full(there.shape, fill).masked_scatter(there, values)


def top_events(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Which events are among the k best of their row: bool [N]; of equal scores the later event is the better.

    A row of k events or fewer keeps all of them. Ties are broken by place, so that the choice depends on nothing but
    the row's own scores: not on other rows, nor on the device.
    """
    if torch.compiler.is_exporting():
        return ranks(scores, lengths) < k
    scores_bl = padded(scores.detach(), lengths, float("-inf"))
    longest = scores_bl.shape[1]
    if k >= longest:
        return torch.ones_like(scores, dtype=torch.bool)
    there_bl = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
    least_b1 = scores_bl.topk(k, dim=1).values[:, -1:]
    above_bl = scores_bl > least_b1
    # Padding equals the k-th best where fewer than k events are there: the mask must be applied again.
    equal_bl = (scores_bl == least_b1) & there_bl
    room_b1 = k - above_bl.sum(1, keepdim=True)
    rank_bl = equal_bl.flip(1).cumsum(1).flip(1)
    return (above_bl | (equal_bl & (rank_bl <= room_b1)))[there_bl]


def ranks(scores: Tensor, lengths: Tensor) -> Tensor:
    """int64 [N]: events of its row that are better than each event, as `top_events` has it; exports at any length."""
    rows = owner(lengths, scores.shape[0])
    order = torch.arange(scores.shape[0], device=scores.device).flip(0)  # of equal scores the later first
    order = order[scores[order].argsort(stable=True, descending=True)]
    order = order[rows[order].argsort(stable=True)]
    first = lengths.cumsum(0) - lengths
    places = torch.arange(scores.shape[0], device=scores.device) - first[rows[order]]
    return torch.zeros_like(places).scatter(0, order, places)
