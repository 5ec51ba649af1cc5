"""PEP: entries below a learned threshold are zero; the thresholds rise until the tables fit.

Liu et al., "Learnable Embedding Sizes for Recommender Systems", ICLR 2021, arXiv 2101.07577. With thresholds s, per id
space and column or coarser,

    vector = sign(e) * max(|e| - sigmoid(s), 0)

Then the entries that are left are trained anew from their first values (the lottery ticket of the paper).

What moves s. It starts so low that sigmoid(s) is zero for all purposes, and so is its derivative (in float32, exactly
zero below -104): the data cannot raise it. Weight decay does, as s is negative; and as Adam divides by the gradient's
own size, it first rises by about `threshold_lr` a step whatever the decay is. Without decay PEP never prunes, and is
refused here.

Differs from the paper:
- The search stops as soon as the entries above their threshold fit the budget, in bytes of the form they are served in;
  what is left of it is spent on the entries closest below. (Published: at given numbers of parameters.)
- Where the epochs end first, the entries with the least above their threshold go until the budget is met
  (by magnitude, or by impact, option `by`).
- Rows that no sample has touched are left out; there is no weight decay on the tables, which are fused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.learned.forms import largest_within, nbytes_of
from embtab.learned.method import Found, Lab, Learned, check_scores, scores_of
from embtab.learned.supernet import Gate
from embtab.learned.training import Training

KINDS = ("global", "space", "column", "space_column")


@dataclass(frozen=True)
class PEP(Learned):
    """Soft thresholds, then retraining.

    Args:
        epochs: of the search, at most.
        thresholds: one for all ("global"), per id space ("space"), per column ("column"), or both ("space_column").
        initial: the value of s that they start from; -15 and -150 in the published code, whose searches are longer.
        threshold_lr: Adam's learning rate for them; 0 for the one at which weight decay alone would raise s to zero, a
            threshold of one half, in three quarters of the epochs.
        weight_decay: their weight decay.
        every: steps between looks at the bytes.
        by: what goes first where the epochs end above the budget: entries of the least "magnitude" beyond their
            threshold, or of the least "impact" (see `scores_of`).
        retrain: "init", from first values; or "found", going on from what the search trained.
    """

    epochs: int = 8
    thresholds: str = "space_column"
    initial: float = -6.0
    threshold_lr: float = 0.0
    weight_decay: float = 1e-5
    every: int = 20
    by: str = "magnitude"
    retrain: str = "init"

    name: ClassVar[str] = "pep"

    def check(self, lab: Lab) -> None:
        """Options within their ranges."""
        check_scores(self.by, lab, self.name)
        if self.thresholds not in KINDS:
            raise UserError(f"pep: thresholds must be one of {', '.join(KINDS)}; got {self.thresholds!r}")
        if self.epochs < 1 or self.every < 1:
            raise UserError(f"pep: epochs and every must be at least 1; got {self.epochs} and {self.every}")
        if not self.weight_decay > 0 or not self.initial < 0:
            raise UserError(
                "pep: weight_decay must be above zero and initial below, as decay alone raises thresholds at first; "
                f"got weight_decay={self.weight_decay}, initial={self.initial}"
            )
        if not self.threshold_lr >= 0:
            raise UserError(f"pep: threshold_lr must be zero or more; got {self.threshold_lr}")
        if self.retrain not in ("init", "found"):
            raise UserError(f"pep: retrain must be init or found; got {self.retrain!r}")

    def search(self, lab: Lab) -> Found:
        """Stage "thresholds"."""
        steps = 0.75 * self.epochs * lab.data.steps_per_epoch
        training = Thresholding(lab, replace(self, threshold_lr=self.threshold_lr or -self.initial / steps))
        lab.trained("thresholds", training, self.epochs)
        margins = training.margins()
        scores = margins
        if self.by == "impact":
            weighed = scores_of(training, training.tables.gated(), self.by)
            scores = {name: np.where(margin > 0, weighed[name], margin) for name, margin in margins.items()}
        masks = largest_within(lab.spaces, scores, lab.budget, lab.spec, self.name)
        measured = training.history[-1]
        above = {name: margin > 0 for name, margin in margins.items()}
        lab.archive.append(lab.note("thresholds", above, measured, epoch=training.epoch))
        reached = bool(nbytes_of(lab.spaces, above, lab.spec) <= lab.budget)
        about = {"reached_by_thresholds": reached, "steps": training.steps}
        return Found(masks, training.weights() if self.retrain == "found" else None, about=about)


class Thresholding(Training):
    """Training until what is above the thresholds fits."""

    def __init__(self, lab: Lab, method: PEP) -> None:
        self.lab, self.method, self.fits = lab, method, False
        super().__init__(lab.setup, lab.data, SoftThreshold(len(lab.spaces), lab.setup.dim, method), lab.seed)

    def margins(self) -> dict[str, np.ndarray]:
        """By how much entries exceed their threshold, float32 [num_ids, D]; -inf in rows never trained."""
        seen, thresholds = self.tables.seen(), self.gate.values().detach()
        return {
            name: np.where(seen[name][:, None], (rows.abs() - thresholds[i]).cpu().numpy(), -np.inf)
            for i, (name, rows) in enumerate(self.tables.rows().items())
        }

    def enough(self) -> bool:
        """Whether it fits, looked at every so many steps; once it did, it stays so."""
        if not self.fits and self.steps and self.steps % self.method.every == 0:
            above = {name: margin > 0 for name, margin in self.margins().items()}
            self.fits = nbytes_of(self.lab.spaces, above, self.lab.spec) <= self.lab.budget
        return self.fits

    def extra(self) -> dict:
        """Whether it fits."""
        return {"fits": self.fits, "steps": self.steps}

    def load_extra(self, state: dict) -> None:
        """Takes it up again."""
        self.fits, self.steps = state["fits"], state["steps"]


class SoftThreshold(Gate):
    """Entries moved towards zero by their threshold, and zero if they would cross it."""

    def __init__(self, spaces: int, dim: int, method: PEP) -> None:
        super().__init__()
        rows = spaces if method.thresholds.startswith("space") else 1
        columns = dim if method.thresholds.endswith("column") else 1
        self.s = nn.Parameter(torch.full((rows, columns), method.initial))
        self.shape, self.lr, self.weight_decay = (spaces, dim), method.threshold_lr, method.weight_decay

    def values(self) -> Tensor:
        """The thresholds, [S, D]."""
        return torch.sigmoid(self.s).expand(self.shape)

    def forward(self, rows: Tensor, places: Tensor, spaces: Tensor) -> Tensor:
        """sign(e) * max(|e| - sigmoid(s), 0)."""
        return rows.sign() * torch.relu(rows.abs() - self.values()[spaces])

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam, whose weight decay is what starts it."""
        return [torch.optim.Adam([self.s], lr=self.lr, weight_decay=self.weight_decay)]
