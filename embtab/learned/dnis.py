"""DNIS / AutoSrh: how much of each column a block of ids needs is learned on validation batches.

Cheng et al., "Differentiable Neural Input Search for Recommender Systems", 2020, arXiv 2006.04466; AutoSrh is its
journal form. Ids of all features are sorted by frequency and cut into blocks; a block has a soft selection alpha in
[0, 1]^D, and

    vector(id) = alpha[block(id)] * e(id)

1. Warm-up with alpha = 1.
2. Bilevel: after each step on a training batch, one of alpha on a batch of the validation split, by SGD on the
   gradient divided by its mean absolute value per block (blocks are met unequally often) plus `alpha_l1`, then clipped
   to [0, 1].
3. alpha is folded into the rows, the entries of the smallest magnitude go until the budget is met, and training goes on
   with the mask.

Differs from the paper:
- The budget is one of bytes, of the form that is served, not a share of entries.
- Training with the mask goes on from the folded rows, always (published: only beyond 98 % pruned).
- The step of alpha is of first order: the tables are updated inside backward, so there is no second derivative through
  their update (the published code's default is first order too).
- Rows that no sample has touched are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from embtab.datasets.reader import Batch
from embtab.errors import UserError
from embtab.learned.forms import largest_within
from embtab.learned.method import Found, Lab, Learned, check_scores, scores_of
from embtab.learned.stages import State
from embtab.learned.supernet import Gate
from embtab.learned.training import Training


@dataclass(frozen=True)
class DNIS(Learned):
    """Warm-up, bilevel search, pruning, retraining.

    Args:
        warmup: epochs with alpha = 1.
        epochs: of the bilevel search.
        blocks: shares of the ids, the most frequent first.
        alpha_lr: learning rate of alpha.
        alpha_l1: added to its gradient, so that what is of no use fades.
        by: "magnitude" of the folded entries, or their "impact" (see `scores_of`).
    """

    warmup: int = 3
    epochs: int = 3
    blocks: tuple[float, ...] = (0.1, 0.2, 0.2, 0.2, 0.3)
    alpha_lr: float = 1e-2
    alpha_l1: float = 1e-5
    by: str = "magnitude"

    name: ClassVar[str] = "dnis"

    def check(self, lab: Lab) -> None:
        """Options within their ranges, and counts of all ids.

        Raises:
            UserError: when it is not known how often the ids of a feature occur.
        """
        check_scores(self.by, lab, self.name)
        if self.warmup < 0 or self.epochs < 1:
            raise UserError(f"dnis: warmup must be 0 or more, epochs 1 or more; got {self.warmup} and {self.epochs}")
        if not self.blocks or min(self.blocks) <= 0 or abs(sum(self.blocks) - 1) > 1e-6:
            raise UserError(f"dnis: blocks must be shares above zero that add up to 1; got {list(self.blocks)}")
        for space in lab.spaces:
            if space.counts is None:
                raise UserError(
                    f"dnis: blocks of ids by frequency need to know how often each id of feature {space.name!r} "
                    "occurs; prepare the data again with counts"
                )

    def search(self, lab: Lab) -> Found:
        """Stages "warmup" and "bilevel"."""
        block_of = torch.from_numpy(
            frequency_blocks([s.counts for s in lab.spaces if s.counts is not None], self.blocks)
        )
        gate = SoftSelection(block_of, len(self.blocks), lab.setup.dim)
        warm = Training(lab.setup, lab.data, gate, lab.seed)
        lab.trained("warmup", warm, self.warmup)
        training = Bilevel(lab, self, warm)
        lab.trained("bilevel", training, self.epochs)
        folded = training.tables.gated()
        masks = largest_within(lab.spaces, scores_of(training, folded, self.by), lab.budget, lab.spec, self.name)
        whole = {name: np.ones(mask.shape, dtype=bool) for name, mask in masks.items()}
        lab.archive.append(lab.note("bilevel", whole, training.history[-1], epoch=training.epoch))
        start = training.weights()
        for name, rows in folded.items():
            start["tables"][f"lookup.{name}"] = rows
        return Found(masks, start, about={"alpha": gate_of(training).alpha.detach().tolist()})


def frequency_blocks(counts: list[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    """int64 [R]: the block of every row of all tables, by falling count; ties in the order of the tables.

    Args:
        counts: int64 [num_ids] of every table.
        shares: of the rows, of each block.
    """
    joined = np.concatenate(counts)
    ends = np.rint(np.cumsum(shares) * len(joined)).astype(np.int64)
    rank = np.empty(len(joined), dtype=np.int64)
    rank[np.argsort(-joined, kind="stable")] = np.arange(len(joined))
    return np.minimum(np.searchsorted(ends, rank, side="right"), len(shares) - 1)


class SoftSelection(Gate):
    """Columns times the alpha of the row's block.

    Args:
        block_of: int64 [R].
        blocks: how many there are.
        dim: D.
    """

    def __init__(self, block_of: Tensor, blocks: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("block_of", block_of)
        self.alpha = nn.Parameter(torch.ones(blocks, dim), requires_grad=False)

    def forward(self, rows: Tensor, places: Tensor, spaces: Tensor) -> Tensor:
        """Entries times alpha."""
        return rows * self.alpha[self.get_buffer("block_of")[places]]


class Bilevel(Training):
    """A step of alpha after every step of the rest."""

    def __init__(self, lab: Lab, method: DNIS, warm: Training) -> None:
        super().__init__(lab.setup, lab.data, warm.gate, lab.seed)
        self.method = method
        self.load_weights(warm.weights())
        self._validation: Iterator[Batch] | None = None
        self._passes = 0

    def before(self) -> None:
        """Each epoch begins with validation batches of its own."""
        if self.steps % self.data.steps_per_epoch == 0:
            self._validation, self._passes = None, 0

    def step(self, batch: Batch) -> float:
        """The training batch moves tables and ranker, a validation batch then alpha."""
        loss = super().step(batch)
        gate_of(self).alpha.requires_grad_()
        held_out = self._next()
        with self.tables.frozen():
            (gradient,) = torch.autograd.grad(self.loss(held_out), [gate_of(self).alpha])
        gate_of(self).alpha.requires_grad_(False)
        self.cost["trained"] += len(held_out)
        moved(gate_of(self).alpha, gradient, self.method.alpha_lr, self.method.alpha_l1)
        return loss

    def _next(self) -> Batch:
        """The next validation batch, in an order of its own for each pass."""
        found = None if self._validation is None else next(self._validation, None)
        if found is None:
            self._validation = self.data.batches("valid", 1000 * self.epoch + self._passes)
            self._passes += 1
            found = next(self._validation)
        return found

    def extra(self) -> State:
        """Nothing: an epoch begins anew in all of it."""
        return {}


@torch.no_grad()
def moved(alpha: Tensor, gradient: Tensor, lr: float, l1: float) -> None:
    """A step of alpha [blocks, D] in place: gradients of mean size 1 per block, plus the L1 term; within [0, 1]."""
    scaled = gradient / (gradient.abs().mean(dim=1, keepdim=True) + 1e-8)
    alpha.sub_(lr * (scaled + l1 * alpha.sign())).clamp_(0, 1)


def gate_of(training: Training) -> SoftSelection:
    """The training's gate."""
    gate = training.gate
    assert isinstance(gate, SoftSelection)
    return gate
