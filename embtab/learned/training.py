"""Training as every stage does it: epochs over the training split, the best of them by validation AUC.

A plain loop, so that a method can take part in each step: what it makes of dense tables is, number by number, what
`embtab fit` and `embtab compare` make of them. Between two epochs all of it can be written down, and goes on from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from embtab.datasets.reader import Batch, ParquetBatches
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.features import read_features
from embtab.fused import Optimizer
from embtab.learned.stages import State
from embtab.learned.supernet import Gate, Supernet
from embtab.tables import EmbeddingBagCollection
from embtab.training.culprit import REMEDY, culprit, not_finite
from embtab.training.metrics import evaluate
from embtab.training.setup import TrainingSetup, make_model


class Data:
    """The splits of a prepared dataset, in batches on a device.

    Args:
        setup: its data and batch size.
        seed: of the shuffle.
        device: of the batches.

    Raises:
        DataError: when the folder is no prepared dataset.
        UserError: when the validation split has rows of one class only, so that nothing can be chosen by it, or a
            feature has hashed ids.
    """

    def __init__(self, setup: TrainingSetup, seed: int, device: torch.device) -> None:
        self.path, self.batch_size, self.seed, self.device = Path(setup.data), setup.batch_size, seed, device
        self.dataset = Dataset.load(self.path)
        self.features = read_features(self.path)
        if hashed := [feature.name for feature in self.features if feature.hashed]:
            raise UserError(
                f"{self.path}: the ids of {hashed[0]!r} are any 64-bit numbers (hashed), and a search needs a row for "
                "each; prepare the data with a vocabulary"
            )
        labels = {float(value) for batch in self.batches("valid") for value in batch.label.unique()}
        if len(labels) < 2:
            only = "no rows" if not labels else f"only rows of label {labels.pop():g}"
            raise UserError(
                f"{self.path}: the validation split has {only}, so it has no AUC to search by; prepare the data with "
                "another split"
            )

    def batches(self, split: str, epoch: int | None = None) -> Iterator[Batch]:
        """The batches of a split; in the file's order, or shuffled as of an epoch."""
        stream = ParquetBatches(self.path, split, self.batch_size, shuffle=epoch is not None, seed=self.seed)
        stream.set_epoch(epoch or 0)
        for batch in stream:
            yield batch.to(self.device)

    def rows(self, split: str) -> int:
        """How many there are."""
        return self.dataset.rows(split)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the training split."""
        return -(-self.rows("train") // self.batch_size)


class Training:
    """A supernet and a ranker in training. Methods override `before`, `step` and `enough`.

    Args:
        setup: the settings.
        data: the splits.
        gate: the method's.
        seed: of first values and everything drawn later.
    """

    def __init__(self, setup: TrainingSetup, data: Data, gate: Gate, seed: int) -> None:
        torch.manual_seed(seed)
        self.data = data
        optimizer = Optimizer(setup.table_optimizer, setup.table_lr)
        self.tables = Supernet(data.features, setup.dim, gate, optimizer, setup.init_std, data.device)
        self.model = make_model(setup, len(data.dataset.dense), len(data.features)).to(data.device)
        adam = torch.optim.Adam(self.model.parameters(), lr=setup.lr, weight_decay=setup.weight_decay)
        self.optimizers: list[torch.optim.Optimizer] = [adam, *self.tables.gate.optimizers()]
        self.epoch = 0
        self.steps = 0
        self.cost = {"seconds": 0.0, "training_seconds": 0.0, "trained": 0, "evaluated": 0}
        self.history: list[dict[str, float]] = []
        self.best: State | None = None
        self.keep_start = False
        """Whether the weights at the start count as an epoch, so that training on can only help on validation."""

    @property
    def gate(self) -> Any:
        """The method's."""
        return self.tables.gate

    def logits(self, batch: Batch) -> Tensor:
        """[B], of a click."""
        return self.model(batch.dense, self.tables.vectors(batch.sparse))

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy in nats.

        Raises:
            UserError: when it is not finite; it names the column, feature or weight that is to blame.
        """
        loss = F.binary_cross_entropy_with_logits(self.logits(batch), batch.label)
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {loss.item()} at step {self.steps} (epoch {self.epoch}): "
                f"{self._culprit(batch)}; {REMEDY}"
            )
        return loss

    @torch.no_grad()
    def _culprit(self, batch: Batch) -> str:
        """What made the loss of a batch infinite or NaN."""
        names = [feature.name for feature in self.data.features]
        vectors = dict(zip(names, self.tables.vectors(batch.sparse).unbind(1), strict=True))
        return culprit(batch, self.data.dataset.dense, vectors, self.model.state_dict())

    def before(self) -> None:
        """What happens before a step, `self.steps` being those done."""

    def step(self, batch: Batch) -> float:
        """One step on a batch of the training split; gives the loss without any penalty."""
        loss, penalty = self.loss(batch), self.gate.penalty()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def enough(self) -> bool:
        """Whether the search has what it wanted, looked at after every step."""
        return False

    def extra(self) -> State:
        """What a method must remember between epochs, beyond gate and optimizers."""
        return {}

    def load_extra(self, state: State) -> None:
        """Takes it up again."""

    def fit(
        self,
        epochs: int,
        patience: int | None,
        save: Callable[[State], None],
        resumed: State | None,
        title: str | None = None,
    ) -> None:
        """Trains, and keeps the epoch of the highest validation AUC.

        Args:
            epochs: at most.
            patience: epochs without improvement before it stops; None to go on, and to keep the last epoch.
            save: called with the whole state after every epoch.
            resumed: a state to go on from.
            title: of the progress on stderr; silent if None.

        Raises:
            UserError: when a loss is not finite.
        """
        if resumed is not None:
            self.load(resumed)
        if self.keep_start and not self.history:
            self.history, self.best = [self.evaluate("valid")], self.weights()
        while self.epoch < epochs and not self._waited(patience) and not self.enough():
            started = time.perf_counter()
            self._epoch(title)
            self.cost["training_seconds"] += time.perf_counter() - started
            self._check()
            measured = self.evaluate("valid")
            if patience is not None and measured["auc"] > max((h["auc"] for h in self.history), default=-1.0):
                self.best = self.weights()
            self.history.append(measured)
            self.cost["seconds"] += time.perf_counter() - started
            if title is not None:
                print(f"{title}: epoch {self.epoch}  val auc {measured['auc']:.5f}", file=sys.stderr, flush=True)
            save(self.state())
        if self.best is not None:
            self.load_weights(self.best)

    def _check(self) -> None:
        """Raises UserError when a table or weight is not finite, so that the last good state stays."""
        wrong = not_finite(self.tables.state_dict() | self.model.state_dict())
        if wrong is not None:
            raise UserError(f"{wrong} is not finite after step {self.steps - 1} (epoch {self.epoch - 1}); {REMEDY}")

    def _waited(self, patience: int | None) -> bool:
        if patience is None or not self.history:
            return False
        aucs = [h["auc"] for h in self.history]
        return len(aucs) - 1 - int(np.argmax(aucs)) >= patience

    def _epoch(self, title: str | None) -> None:
        self.model.train()
        self.tables.train()
        shown = title is not None and sys.stderr.isatty()
        bar = tqdm(total=self.data.steps_per_epoch, desc=f"{title} {self.epoch}", file=sys.stderr, disable=not shown)
        for batch in self.data.batches("train", self.epoch):
            self.before()
            self.step(batch)
            self.steps += 1
            self.cost["trained"] += len(batch)
            bar.update()
            if self.enough():
                break
        bar.close()
        self.epoch += 1

    def evaluate(self, split: str) -> dict[str, float]:
        """All metrics of a split."""
        self.cost["evaluated"] += self.data.rows(split)
        return measure(self.tables, self.model, self.data, split)

    def weights(self) -> State:
        """Tables (with what their optimizer remembers), gate and ranker, copied."""
        return {
            "tables": {name: value.clone() for name, value in self.tables.state_dict().items()},
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
        }

    def load_weights(self, weights: State) -> None:
        """Takes them up; those of another gate are left aside."""
        mine = self.tables.state_dict()
        gate = {name: value for name, value in mine.items() if name.startswith("gate.")}
        tables = {name: value for name, value in weights["tables"].items() if not name.startswith("gate.")}
        theirs = {name: weights["tables"].get(name, value) for name, value in gate.items()}
        self.tables.load_state_dict(tables | theirs)
        self.model.load_state_dict(weights["model"])

    def state(self) -> State:
        """Everything that decides how it goes on."""
        return {
            **self.weights(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
            "epoch": self.epoch,
            "steps": self.steps,
            "cost": dict(self.cost),
            "history": list(self.history),
            "best": self.best,
            "extra": self.extra(),
        }

    def load(self, state: State) -> None:
        """Goes on from a state."""
        self.load_weights(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.cost, self.history, self.best = dict(state["cost"]), list(state["history"]), state["best"]
        self.load_extra(state["extra"])


@torch.no_grad()
def measure(tables: EmbeddingBagCollection, model: torch.nn.Module, data: Data, split: str) -> dict[str, float]:
    """All metrics of tables and a ranker on a split."""
    tables.eval()
    model.eval()
    logits, labels, users = [], [], []
    for batch in data.batches(split):
        logits.append(model(batch.dense, tables.vectors(batch.sparse)).float().cpu().numpy())
        labels.append(batch.label.cpu().numpy())
        users += [] if batch.user is None else [batch.user.cpu().numpy()]
    return evaluate(np.concatenate(labels), np.concatenate(logits), np.concatenate(users) if users else None)
