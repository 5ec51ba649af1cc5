"""The baseline of sequence models: a history is the mean of its events, whatever the target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from embtab.models.events import Events, segment_sum
from embtab.models.layers import Head


class MeanPool(nn.Module):
    """The head of DIN over [others, mean of the history, target, mean * target].

    Args:
        num_dense: number of numeric values; may be 0.
        num_others: number of vectors beside the events; may be 0.
        num_fields: F, fields of an event.
        dim: D, embedding dimension.
        hidden: widths of the head's hidden layers.
        act: activation of the head.
        dropout: share of the head's inputs dropped while training.
    """

    def __init__(
        self,
        num_dense: int,
        num_others: int,
        num_fields: int,
        dim: int,
        *,
        hidden: Sequence[int] = (200, 80),
        act: str = "dice",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.head = Head(num_dense + (num_others + 3 * num_fields) * dim, hidden, act, dropout)

    def forward(self, dense: Tensor, others: Tensor, events: Events) -> Tensor:
        """Logits [B] of a click; see `embtab.models.events` for the arguments."""
        target_be = events.target.flatten(1)
        sum_be = segment_sum(events.history.flatten(1), events.lengths)
        mean_be = sum_be / events.lengths.clamp(min=1).unsqueeze(1)
        logits: Tensor = self.head(dense, others, mean_be, target_be, mean_be * target_be)
        return logits
