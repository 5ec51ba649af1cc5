"""OptEmbed: which ids keep a row is learned by thresholds, how wide a field's rows are by evolution.

Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction", CIKM 2022, arXiv 2208.04482.

1. Supernet. A row counts while its L1 norm exceeds its field's threshold t, and each sample sees a random prefix of
   every field's D columns, the widths 1..D with equal chance:

       vector = step(|e|_1 - t) * prefix * e        loss = BCE + alpha * sum over fields of exp(-t)

   The step has the long-tailed estimator for a derivative: 2 - 4|x| up to 0.4, 0.4 up to 1, then 0. Thresholds are
   trained by SGD; exp(-t) pushes them up, the data wherever a row is missed.
2. Evolution of a width per field, by the validation AUC of the supernet cut to these widths.
3. Retraining from first values, rows and widths fixed.

Righted, where the published code (fuyuanlyu/OptEmbed) goes wrong; the first four in `embtab.learned.evolution`:
mutation that changes the parents; genes that cannot mutate to width 1; a crossover point beyond the genes; no elitism;
widths counted one too low (here a width is a number of columns); per-feature thresholds that are not there (thresholds
are per field, here per id space, everywhere); a retraining that wants files of debug runs (every artefact is always
written); "compressed" tables that are full ones with zeros (here rows and columns are gone, and the row map is
counted); and rows that no sample has touched, which weight decay let fade below the threshold (here they are dropped
for what they are). And the search knows a budget, which no candidate exceeds.

Differs further: the tables are trained by the fused lookup's optimizer, without weight decay on them. Fields of one id
space have one threshold and one width, as they have one table. Where the thresholds leave too many rows for any
width to fit the budget, the search says so; `row_budget` then drops further rows, those of the least impact.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.learned.evolution import Candidate, Evolution, Genes
from embtab.learned.forms import largest_within, smallest
from embtab.learned.method import Found, Lab, Learned, check_scores, scores_of
from embtab.learned.stages import Save, State
from embtab.learned.supernet import Gate, joined
from embtab.learned.training import Training
from embtab.training.metrics import auc, logloss


@dataclass(frozen=True)
class OptEmbed(Learned):
    """Supernet, evolution, retraining.

    Args:
        epochs: of the supernet, at most; it stops as the setup's patience says.
        alpha: weight of the thresholds' penalty.
        threshold_lr: their learning rate; 0 for the one at which the penalty alone would raise them, in all epochs, to
            about half the L1 norm that rows start with.
        generations: of the evolution.
        parents: best candidates that have children.
        mutations: children by mutation, each generation.
        crossovers: children by crossover.
        chance: of a gene to mutate.
        search_rows: rows of the validation split that candidates are compared on, at most: the first ones.
        row_budget: before the evolution, the rows of the least impact (L1 norm times the root of the row's squared
            gradients, see `scores_of`) are dropped until those left take at most this many times the budget at full
            width; 0 leaves rows to the thresholds alone, as published.
    """

    epochs: int = 8
    alpha: float = 1e-5
    threshold_lr: float = 0.0
    generations: int = 15
    parents: int = 15
    mutations: int = 10
    crossovers: int = 10
    chance: float = 0.1
    search_rows: int = 200_000
    row_budget: float = 0.0

    name: ClassVar[str] = "optembed"

    def check(self, lab: Lab) -> None:
        """Options within their ranges."""
        for name in ("epochs", "generations", "parents", "mutations", "search_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"optembed: {name} must be at least 1; got {getattr(self, name)}")
        if not self.alpha > 0 or not self.threshold_lr >= 0:
            raise UserError(
                f"optembed: alpha must be above zero and threshold_lr not below; got {self.alpha}, {self.threshold_lr}"
            )
        if self.row_budget and self.row_budget < 1:
            raise UserError(f"optembed: row_budget must be 0 or at least 1; got {self.row_budget}")
        if self.row_budget:
            check_scores("impact", lab, self.name)

    def search(self, lab: Lab) -> Found:
        """Stages "supernet" and "evolution"."""
        norm = lab.setup.dim * lab.setup.init_std * (2 / math.pi) ** 0.5
        reached = self.alpha * self.epochs * lab.data.steps_per_epoch
        gate = Thresholds(len(lab.spaces), lab.setup.dim, self.alpha, self.threshold_lr or norm / 2 / reached)
        training = Training(lab.setup, lab.data, gate, lab.seed)
        lab.trained("supernet", training, self.epochs, lab.setup.patience)
        rows = self._rows(lab, training)
        table = np.array([self._sizes(lab, i, rows[space.name]) for i, space in enumerate(lab.spaces)])
        genes = Genes(table, lab.budget, self.name)

        def work(save: Save, resumed: State | None) -> State:
            return self._evolve(lab, training, rows, genes, save, resumed)

        state = lab.stages.run("evolution", work)
        lab.archive += state["archive"]
        widths = dict(zip(rows, state["best"], strict=True))
        masks = {name: kept[:, None] & (np.arange(lab.setup.dim) < widths[name]) for name, kept in rows.items()}
        thresholds = dict(zip(rows, gate.thresholds.detach().tolist(), strict=True))
        kept = {name: int(each.sum()) for name, each in rows.items()}
        about: dict[str, Any] = {"widths": widths, "rows": kept, "thresholds": thresholds, "best": state["best_auc"]}
        return Found(masks, None, about=about)

    def _rows(self, lab: Lab, training: Training) -> dict[str, np.ndarray]:
        """Ids that keep a row, bool [num_ids] by id space."""
        gated = training.tables.eval().gated()  # zeros below the threshold
        kept = {name: seen & gated[name].any(1).cpu().numpy() for name, seen in training.tables.seen().items()}
        if not self.row_budget:
            return kept
        impact = scores_of(training, gated, "impact")
        scores = {name: np.where(kept[name], score.sum(axis=1), -np.inf) for name, score in impact.items()}
        wide = {name: np.repeat(score[:, None], lab.setup.dim, axis=1) for name, score in scores.items()}
        masks = largest_within(lab.spaces, wide, int(self.row_budget * lab.budget), lab.spec, self.name)
        return {name: mask[:, 0] for name, mask in masks.items()}

    def _sizes(self, lab: Lab, i: int, kept: np.ndarray) -> list[int]:
        """Bytes of an id space at widths 0..D."""
        dim = lab.setup.dim
        masks = (kept[:, None] & (np.arange(dim) < width) for width in range(dim + 1))
        return [smallest(lab.spaces[i], mask, lab.spec).nbytes for mask in masks]

    def _evolve(
        self, lab: Lab, training: Training, rows: dict[str, np.ndarray], genes: Genes, save: Save, resumed: State | None
    ) -> State:
        """All generations, and what they measured."""
        judge = Judge(lab, training, rows, self.search_rows)
        evolution = Evolution(genes, lab.seed, self.parents, self.mutations, self.crossovers, self.chance)
        if resumed is not None:
            evolution.load(resumed["evolution"])
            judge.take_up(resumed)
        while evolution.generation < self.generations:
            evolution.step(judge)
            save({"evolution": evolution.state(), **judge.state()})
            if lab.title is not None:
                best = evolution.best()[0]
                judge.say(f"{lab.title} generation {evolution.generation}", evolution.fitness[best], best)
        archive = [
            {
                "stage": "evolution",
                "nbytes": genes.size(one),
                "auc": fitness,
                "logloss": judge.losses[one],
                "generation": evolution.born[one],
                "widths": dict(zip(rows, one, strict=True)),
            }
            for one, fitness in evolution.fitness.items()
        ]
        best = evolution.best()[0]
        return {"best": list(best), "best_auc": evolution.fitness[best], "archive": archive, "cost": judge.cost}


class Judge:
    """Validation AUC of the supernet at given widths; rows are looked up once, for all candidates."""

    def __init__(self, lab: Lab, training: Training, rows: dict[str, np.ndarray], most: int) -> None:
        self.training, self.dim = training, lab.setup.dim
        self.losses: dict[Candidate, float] = {}
        self.cost: dict[str, Any] = {"seconds": 0.0, "training_seconds": 0.0, "trained": 0, "evaluated": 0}
        started = time.perf_counter()
        self.owners = training.tables.get_buffer("owners")
        training.gate.dropped = ~joined(rows).to(self.owners.device)
        training.model.eval()
        training.tables.eval()
        self.batches: list[tuple[Tensor, Tensor]] = []
        labels: list[np.ndarray] = []
        with torch.no_grad():
            for batch in lab.data.batches("valid"):
                if sum(map(len, labels)) >= most:
                    break
                self.batches.append((batch.dense, training.tables.vectors(batch.sparse)))
                labels.append(batch.label.cpu().numpy())
        self.labels = np.concatenate(labels)
        if len(np.unique(self.labels)) < 2:
            raise UserError(
                f"optembed: the first {len(self.labels)} rows of the validation split have one label; raise search_rows"
            )
        self.cost["seconds"] += time.perf_counter() - started

    @torch.no_grad()
    def __call__(self, candidate: Candidate) -> float:
        """The AUC."""
        started = time.perf_counter()
        widths = torch.tensor(candidate, device=self.owners.device)[self.owners]
        prefix = (torch.arange(self.dim, device=widths.device) < widths[:, None]).float()
        logits = [self.training.model(dense, vectors * prefix).float().cpu().numpy() for dense, vectors in self.batches]
        scores = np.concatenate(logits)
        self.losses[candidate] = logloss(self.labels, scores)
        self.cost["seconds"] += time.perf_counter() - started
        self.cost["evaluated"] += len(scores)
        return auc(self.labels, scores)

    def state(self) -> State:
        """What goes into a file between generations."""
        return {"cost": dict(self.cost), "losses": [[list(c), loss] for c, loss in self.losses.items()]}

    def take_up(self, state: State) -> None:
        """Goes on from it."""
        self.cost = {name: state["cost"][name] + value for name, value in self.cost.items()}
        self.losses = {tuple(candidate): loss for candidate, loss in state["losses"]}

    @staticmethod
    def say(what: str, best: float, candidate: Candidate) -> None:
        """A line on stderr."""
        print(f"{what}: best val auc {best:.5f}  widths {list(candidate)}", file=sys.stderr, flush=True)


class Thresholds(Gate):
    """Rows whose L1 norm exceeds their id space's threshold; in training, random prefixes of them.

    Args:
        spaces: S.
        dim: D.
        alpha: weight of the penalty.
        lr: of the thresholds.
    """

    def __init__(self, spaces: int, dim: int, alpha: float, lr: float) -> None:
        super().__init__()
        self.thresholds = nn.Parameter(torch.zeros(spaces))
        self.dim, self.alpha, self.lr = dim, alpha, lr
        self.dropped: Tensor | None = None

    def forward(self, rows: Tensor, places: Tensor, spaces: Tensor) -> Tensor:
        """The rows that count, zeros for the others."""
        kept: Tensor = Step.apply(rows.abs().sum(1) - self.thresholds[spaces])
        if self.dropped is not None:
            kept = kept * ~self.dropped[places]
        return rows * kept.unsqueeze(1)

    def pooled(self, vectors: Tensor) -> Tensor:
        """In training, a random prefix per sample and feature."""
        if not self.training:
            return vectors
        widths = torch.randint(1, self.dim + 1, vectors.shape[:2], device=vectors.device)
        return vectors * (torch.arange(self.dim, device=vectors.device) < widths.unsqueeze(-1))

    def penalty(self) -> Tensor:
        """Alpha times the sum of exp(-t)."""
        return self.alpha * torch.exp(-self.thresholds).sum()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Plain SGD, as published."""
        return [torch.optim.SGD([self.thresholds], lr=self.lr)]


class Step(torch.autograd.Function):
    """1 where x > 0, else 0; backward by the long-tailed estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """The step."""
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """2 - 4|x| up to 0.4, 0.4 up to 1, then 0."""
        (x,) = ctx.saved_tensors
        distance = x.abs()
        slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.where(distance <= 1, 0.4, 0.0))
        return gradient * slope
