"""Magnitude pruning on a schedule: the smallest entries go, step by step, while everything trains on.

Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, arXiv
1710.01878; for embedding tables DeepLight (Deng et al., WSDM 2021, arXiv 2002.06987). The baseline that searches have
to beat: in Tran et al. (arXiv 2406.17335) it rivals them.

Differs from the papers:
- The schedule is one of bytes. Between `start` and `end`, shares of the epochs, the tables may take

      budget + (dense - budget) * (1 - progress)^3

  bytes in the form they will be served in, indices included, and the entries of the smallest absolute values go, over
  all tables together. A sparsity of 90 % would leave the bytes to chance.
- Rows that no training sample has touched go first: what they hold was drawn, not learned.
- A pruned entry gets no gradient and does not come back, as in the published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.learned.forms import largest_within
from embtab.learned.method import Found, Lab, Learned, check_scores, scores_of
from embtab.learned.stages import State
from embtab.learned.supernet import Masked, joined
from embtab.learned.training import Training


@dataclass(frozen=True)
class Magnitude(Learned):
    """Gradual magnitude pruning.

    Args:
        epochs: of the pruning; training then goes on with the mask as long as it helps.
        start: share of these epochs before the first pruning.
        end: share of them at which the budget is reached.
        every: steps between prunings.
        by: "magnitude", or "impact": magnitude weighted by the gradients that the row has seen (see `scores_of`).
    """

    epochs: int = 4
    start: float = 0.25
    end: float = 0.9
    every: int = 50
    by: str = "magnitude"

    name: ClassVar[str] = "magnitude"

    def check(self, lab: Lab) -> None:
        """Options within their ranges."""
        check_scores(self.by, lab, self.name)
        if not 0 <= self.start < self.end <= 1:
            raise UserError(f"magnitude: 0 <= start < end <= 1 must hold; got start={self.start}, end={self.end}")
        if self.epochs < 1 or self.every < 1:
            raise UserError(f"magnitude: epochs and every must be at least 1; got {self.epochs} and {self.every}")

    def search(self, lab: Lab) -> Found:
        """One stage: training with a shrinking mask; retraining goes on from it."""
        training = Pruning(lab, self)
        state = lab.trained("prune", training, self.epochs)
        masks = training.pruned_to(lab.budget)
        lab.archive += state["extra"]["archive"]
        return Found(masks, training.weights())


class Pruning(Training):
    """Training whose mask shrinks."""

    def __init__(self, lab: Lab, method: Magnitude) -> None:
        self.lab, self.method = lab, method
        self.archive: list[dict[str, Any]] = []
        everything = torch.ones(sum(s.num_ids for s in lab.spaces), lab.setup.dim, dtype=torch.bool)
        super().__init__(lab.setup, lab.data, Masked(everything), lab.seed)
        self.full = sum(lab.spec.dense_bytes(space) for space in lab.spaces)

    def allowed(self, step: int) -> int:
        """Bytes at a step; the budget from `end` on."""
        last = self.method.epochs * self.data.steps_per_epoch
        first, end = self.method.start * last, self.method.end * last
        progress = min(max((step - first) / (end - first), 0.0), 1.0)
        return self.lab.budget + int(max(self.full - self.lab.budget, 0) * (1 - progress) ** 3)

    def before(self) -> None:
        """Prunes where it is time."""
        if self.steps % self.method.every == 0 and self.allowed(self.steps) < self.full:
            self.pruned_to(self.allowed(self.steps))

    def pruned_to(self, nbytes: int) -> dict[str, np.ndarray]:
        """Masks that take at most `nbytes`, which are in force from now on."""
        scores = scores_of(self, self.tables.gated(), self.method.by)
        kept = apart(self.gate.mask, scores)
        for name, score in scores.items():
            score[~kept[name]] = -float("inf")
        masks = largest_within(self.lab.spaces, scores, nbytes, self.lab.spec, self.method.name)
        self.gate.mask.copy_(joined(masks))
        return masks

    def evaluate(self, split: str) -> dict[str, float]:
        """All metrics, which go into the archive with the bytes they were reached at."""
        measured = super().evaluate(split)
        masks = apart(self.gate.mask, self.tables.rows())
        self.archive.append(self.lab.note("prune", masks, measured, epoch=self.epoch))
        return measured

    def extra(self) -> State:
        """The archive so far."""
        return {"archive": list(self.archive)}

    def load_extra(self, state: State) -> None:
        """Takes it up again."""
        self.archive = list(state["archive"])


def apart(mask: Tensor, like: Mapping[str, Sized]) -> dict[str, np.ndarray]:
    """A mask [R, D] as one bool array [num_ids, D] per id space, copied."""
    parts = mask.cpu().split([len(each) for each in like.values()])
    return {name: part.numpy().copy() for name, part in zip(like, parts, strict=True)}
