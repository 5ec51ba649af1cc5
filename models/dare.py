"""DARE: long histories searched by one embedding table and represented by another (Feng et al., ICLR 2025,
arXiv 2410.02604); with one table for both it is a TWIN-style two-stage model (Chang et al., KDD 2023).

    search          s_i = <q, k_i> / sqrt(d) + <q', k'_i> / sqrt(d')      k best events of a history
    representation  h   = v * sum_i softmax(s)_i e_i                      softmax over those k only

q and k_i are *attention* vectors of target and event, q' and k'_i those of their positions; v and e_i are
*representation* vectors. d is the width of the attention vectors without position, d' that of a position. The paper
finds that one table cannot serve both ends: most gradients of the two conflict.

Where the authors' code (github.com/thuml/DARE) and this file differ:

                        authors' code                                   here
    padding             may be selected, and then has weight            there is none
    empty history       uniform weights over padding                    zeros
    head's input        [v, h, v * h]                                   [v, sum w e, h]
    further loss        a head of its own for the whole history         `auxiliary`, off by default
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models.events import Events, segment_softmax, segment_sum, top_events
from embtab.models.layers import Head

LONG = 256
"""Histories of so many events on average are scored one at a time."""


class DARE(nn.Module):
    """Search by attention vectors, then target-aware representation of what was found.

    Args:
        num_dense: number of numeric values; may be 0.
        num_others: number of vectors beside the events; may be 0.
        num_fields: F, fields of an event.
        dim: D, dimension of the representation; that of the attention is whatever the attention vectors have.
        top_k: events that the search keeps; 0 keeps all.
        has_position: the last field of an event is its position, which the search scales on its own.
        hidden: widths of the head's hidden layers.
        act: activation of the head.
        dropout: share of the head's inputs dropped while training.
        auxiliary: add the loss of a small head that sees the whole history, weighted by attention, so that events that
            the search passes over have gradients too; training then looks up all of them.

    Raises:
        UserError: for a negative `top_k`, or a position that is the only field.
    """

    def __init__(
        self,
        num_dense: int,
        num_others: int,
        num_fields: int,
        dim: int,
        *,
        top_k: int = 20,
        has_position: bool = True,
        hidden: Sequence[int] = (200, 80),
        act: str = "prelu",
        dropout: float = 0.0,
        auxiliary: bool = False,
    ):
        super().__init__()
        if top_k < 0:
            raise UserError(f"top_k must be 0 (all events) or more, got {top_k}")
        if num_fields <= has_position:
            raise UserError("an event needs a field beside its position")
        self.top_k = top_k
        self.has_position = has_position
        self.head = Head(num_dense + (num_others + 3 * num_fields) * dim, hidden, act, dropout)
        self.whole = Head(num_fields * dim, hidden[:1], act, dropout) if auxiliary else None

    def scores(self, attention: Events) -> Tensor:
        """Float [N]: how well each event's attention vectors fit those of its target."""
        target_bfd = attention.target
        fields, dim = target_bfd.shape[1:]
        meaning = fields - self.has_position
        scale_f = torch.full((fields,), (meaning * dim) ** -0.5, device=target_bfd.device)
        scale_f[meaning:] = dim**-0.5
        return _dots((target_bfd * scale_f.unsqueeze(1)).flatten(1), attention)

    def search(self, attention: Events) -> Tensor:
        """Bool [N]: the `top_k` events of each history with the highest scores.

        Searching again among the events found finds them all; so whoever looks up vectors may search first, with
        attention vectors of whole histories, and give `forward` only the vectors of what was found.
        """
        if not self.top_k:
            return torch.ones(len(attention.history), dtype=torch.bool, device=attention.history.device)
        return top_events(self.scores(attention), attention.lengths, self.top_k)

    def summary(self, events: Events, attention: Events) -> Tensor:
        """Float [B, F * D]: representation vectors of the events found, weighted by attention; zero for no event."""
        found = self.search(attention)
        if torch.compiler.is_exporting():  # events that are not found stay, without weight: lengths must not change
            scores = self.scores(attention).masked_fill(~found, float("-inf"))
            weights = segment_softmax(scores, events.lengths)
            return segment_sum(weights.unsqueeze(1) * events.history.flatten(1), events.lengths)
        weights = segment_softmax(self.scores(attention)[found], (kept := events.kept(found)).lengths)
        return segment_sum(weights.unsqueeze(1) * kept.history.flatten(1), kept.lengths)

    def forward(self, dense: Tensor, others: Tensor, events: Events, attention: Events | None = None) -> Tensor:
        """Logits [B] of a click.

        Args:
            dense: float [B, N], numeric values.
            others: float [B, C, D], vectors beside the events.
            events: representation vectors.
            attention: attention vectors of the same events, of any dimension; the representation's where left out.
        """
        target_be = events.target.flatten(1)
        summary_be = self.summary(events, events if attention is None else attention)
        logits: Tensor = self.head(dense, others, target_be, summary_be, target_be * summary_be)
        return logits

    def auxiliary_logits(self, events: Events, attention: Events | None = None) -> Tensor:
        """Logits [B] of the auxiliary head: from the product of the target and the whole history.

        Raises:
            UserError: when the model was made without it.
        """
        if self.whole is None:
            raise UserError("the model has no auxiliary head; make it with auxiliary=True")
        weights = segment_softmax(self.scores(events if attention is None else attention), events.lengths)
        summary_be = segment_sum(weights.unsqueeze(1) * events.history.flatten(1), events.lengths)
        logits: Tensor = self.whole(events.target.flatten(1) * summary_be)
        return logits


def _dots(target_be: Tensor, events: Events) -> Tensor:
    """Float [N]: the product of each event's vector and its row of [B, E]."""
    history_ne = events.history.flatten(1)
    plain = torch.is_grad_enabled() or history_ne.is_cuda or torch.compiler.is_compiling()
    if plain or history_ne.shape[0] < LONG * max(target_be.shape[0], 1):
        return (target_be[events.owner] * history_ne).sum(1)
    # Row by row nothing as large as the history is written: measured on a CPU, a fourth of the time or less.
    rows = history_ne.split(events.lengths.tolist())
    return torch.cat([row_le.mv(target_e) for row_le, target_e in zip(rows, target_be, strict=True)])
