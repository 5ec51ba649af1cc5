"""DIN: a history is a sum of its events, weighted by how much they matter to the target (Zhou et al., KDD 2018,
arXiv 1706.06978).

    v_U(target) = sum_i a(k_i, q) k_i        a = MLP([q, k, q - k, q * k])

q is the target, k_i an event. The weights are not normalised: their sum keeps how strong an interest is.

Where the paper and its authors' code (github.com/zhougr1993/DeepInterestNetwork) differ:

                        paper                     authors' code               here
    weights             as they are               softmax(a / sqrt(E))        `softmax`, off by default
    activation unit     36 units, PReLU or Dice   80, 40 units, sigmoid       `attention`, `attention_act`: 36, Dice
    head                200, 80 units, Dice       80, 40 units, sigmoid       `hidden`, `act`: 200, 80, Dice
    head's input        user, history, target     [u, q, u * q]               as the code, and what else there is

The first layer of the activation unit is linear in the four quarters of its input, so the quarters need not be laid
out: q (Wq + Wd) + k (Wk - Wd) + (q * k) Wp, where the first term is computed per row and not per event.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models.events import Events, segment_softmax
from embtab.models.layers import Head, Linear, activation, linear, mlp
from embtab.models.segments import row_products, spread, weighted_sum

LONG = 128  # events a row from which on a matrix for each row pays, on a CPU


class ActivationUnit(nn.Module):
    """How much each event matters to its target: an MLP over [q, k, q - k, q * k].

    Args:
        width: E, of an event's vector.
        hidden: widths of the hidden layers, at least one.
        act: activation after each.
    """

    def __init__(self, width: int, hidden: Sequence[int] = (36,), act: str = "dice"):
        super().__init__()
        if not hidden:
            raise UserError("the activation unit of DIN needs a hidden layer")
        self.first = Linear(4 * width, hidden[0])
        self.rest = nn.Sequential(activation(act, hidden[0]), *mlp(hidden[0], hidden[1:], act))

    def forward(self, target_be: Tensor, history_ne: Tensor, lengths_b: Tensor) -> Tensor:
        """Scores [N] of events [N, E]; the first lengths_b[0] of them belong to the first of the targets [B, E]."""
        of_q, of_k, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        per_row = linear(target_be, of_q + of_difference, self.first.bias)
        total = history_ne.shape[0]  # not len(), which an export would take for a constant
        if _is_long(history_ne, target_be):
            matrices_beh = torch.addcmul((of_k - of_difference).t(), target_be.unsqueeze(2), of_product.t())
            per_event = row_products(history_ne, matrices_beh, lengths_b)
        else:
            per_event = linear(spread(target_be, lengths_b, total) * history_ne, of_product)
            per_event.add_(linear(history_ne, of_k - of_difference))  # in place: large results cost their pages
        scores: Tensor = self.rest(per_event.add_(spread(per_row, lengths_b, total)))
        return scores.squeeze(-1)


def _is_long(history_ne: Tensor, target_be: Tensor) -> bool:
    """Whether a matrix for each row is quicker: k (Wk - Wd) + (q * k) Wp = k (Wk - Wd + diag(q) Wp)."""
    quick = history_ne.device.type == "cpu" and history_ne.dtype == torch.float32
    if not quick or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return len(history_ne) >= LONG * len(target_be)


class DIN(nn.Module):
    """The deep interest network: embeddings of target and history in, logits out.

    Args:
        num_dense: number of numeric values; may be 0.
        num_others: number of vectors beside the events; may be 0.
        num_fields: F, fields of an event.
        dim: D, embedding dimension.
        attention: hidden layers of the activation unit.
        attention_act: their activation.
        softmax: normalise the weights of a history.
        hidden: widths of the head's hidden layers.
        act: activation of the head.
        dropout: share of the head's inputs dropped while training.

    Raises:
        UserError: for an unknown activation, or an activation unit without a hidden layer.
    """

    def __init__(
        self,
        num_dense: int,
        num_others: int,
        num_fields: int,
        dim: int,
        *,
        attention: Sequence[int] = (36,),
        attention_act: str = "dice",
        softmax: bool = False,
        hidden: Sequence[int] = (200, 80),
        act: str = "dice",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.softmax = softmax
        self.unit = ActivationUnit(num_fields * dim, attention, attention_act)
        self.head = Head(num_dense + (num_others + 3 * num_fields) * dim, hidden, act, dropout)

    def scores(self, events: Events) -> Tensor:
        """Float [N]: what the activation unit says of each event, before any softmax."""
        scores: Tensor = self.unit(events.target.flatten(1), events.history.flatten(1), events.lengths)
        return scores

    def interest(self, events: Events) -> Tensor:
        """Float [B, E]: the weighted sum of each history; zero for an empty one."""
        weights = self.scores(events)
        history_ne = events.history.flatten(1)
        if self.softmax:
            weights = segment_softmax(weights / history_ne.shape[1] ** 0.5, events.lengths)
        return weighted_sum(history_ne, weights, events.lengths)

    def forward(self, dense: Tensor, others: Tensor, events: Events) -> Tensor:
        """Logits [B] of a click; see `embtab.models.events` for the arguments."""
        target_be, interest_be = events.target.flatten(1), self.interest(events)
        logits: Tensor = self.head(dense, others, interest_be, target_be, interest_be * target_be)
        return logits
