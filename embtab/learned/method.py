"""What a learned method is: some stages that end in a mask of entries. Everything around them is shared.

train form (a gate, `embtab.learned.supernet`) -> search -> mask -> retraining -> serving form (`embtab.learned.forms`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature, id_spaces
from embtab.learned.forms import Masks, nbytes_of
from embtab.learned.stages import Save, Stages, State
from embtab.learned.training import Data, Training
from embtab.methods import Spec
from embtab.training.setup import TrainingSetup

SCORES = ("magnitude", "impact")


@dataclass
class Lab:
    """What a search works with.

    Args:
        setup: the settings of training.
        data: the splits.
        spec: dimension, seed and precision of what is served.
        budget: serving bytes.
        seed: of everything drawn.
        stages: where results are kept.
        title: of the progress on stderr; silent if None.
    """

    setup: TrainingSetup
    data: Data
    spec: Spec
    budget: int
    seed: int
    stages: Stages
    title: str | None = None
    archive: list[dict[str, Any]] = field(default_factory=list)
    """Every shape that was measured on the validation split: stage, bytes, auc, logloss, and what the method adds."""
    peak: int = 0
    """The most training bytes of any stage."""

    @property
    def spaces(self) -> list[Feature]:
        """The id spaces."""
        return id_spaces(self.data.features)

    def trained(self, name: str, training: Training, epochs: int, patience: int | None = None) -> State:
        """Trains as a stage of its own, and leaves `training` with the weights that came out.

        Returns:
            weights, cost and history; what `training.found` adds.
        """

        def work(save: Save, resumed: State | None) -> State:
            title = None if self.title is None else f"{self.title} {name}"
            training.fit(epochs, patience, save, resumed, title)
            kept = {"weights": training.weights(), "cost": training.cost, "history": training.history}
            return kept | {"epochs": training.epoch, "extra": training.extra()}

        self.peak = max(self.peak, training.tables.training_nbytes)
        state = self.stages.run(name, work)
        training.load_weights(state["weights"])
        training.load_extra(state["extra"])
        training.epoch, training.cost, training.history = state["epochs"], state["cost"], state["history"]
        return state

    def note(self, stage: str, masks: Masks | None, measured: Mapping[str, float], **more: Any) -> dict[str, Any]:
        """A line for the archive; its bytes are counted, unless `nbytes` is among `more`."""
        size = {} if masks is None else {"nbytes": nbytes_of(self.spaces, masks, self.spec)}
        return {"stage": stage, **size, "auc": measured["auc"], "logloss": measured["logloss"], **more}


@dataclass
class Found:
    """What a search found.

    Args:
        masks: entries kept, within the budget.
        start: weights that training goes on from; None to begin anew from the first values of the same seed.
        retrain: whether to train at all with the mask.
        about: plain JSON types, for the report.
    """

    masks: dict[str, np.ndarray]
    start: State | None
    retrain: bool = True
    about: dict[str, Any] = field(default_factory=dict)


class Learned(ABC):
    """A method that finds its own shape. Subclasses are frozen dataclasses whose fields are the method's options."""

    name: ClassVar[str]

    def check(self, lab: Lab) -> None:
        """Refuses, before anything is trained, what the method cannot work with.

        Raises:
            UserError: for options that make no sense, or data that lacks what the method needs.
        """
        return None

    @abstractmethod
    def search(self, lab: Lab) -> Found:
        """Runs the method's stages, each by `lab.trained` or `lab.stages.run`, and adds to `lab.archive`.

        Raises:
            InfeasibleBudget: when the smallest shape takes more than `lab.budget`.
        """


def scores_of(
    training: Training, vectors: Mapping[str, Tensor] | None = None, by: str = "magnitude"
) -> dict[str, np.ndarray]:
    """Scores of entries, float32 [num_ids, D] by id space; -inf in rows that training has never touched.

    Args:
        training: its tables.
        vectors: float32 [num_ids, D] by id space, whose values count instead of the stored rows.
        by: "magnitude", the absolute value; or "impact", its product with the root of the sum of squared gradients
            that the row has seen, as the tables' Adagrad remembers it. That sum is the diagonal of the empirical Fisher
            information, so half the square of the score estimates what dropping the entry adds to the loss (LeCun et
            al., "Optimal Brain Damage", NIPS 1989): a value of a frequent id weighs more than the same of a rare one.
    """
    seen, moments = training.tables.seen(), training.tables.lookup.optimizer_state()
    scores = {}
    for name, rows in (training.tables.rows() if vectors is None else vectors).items():
        score = rows.detach().abs()
        if by == "impact":
            score = score * moments[name].sqrt().reshape(len(rows), -1)
        scores[name] = np.where(seen[name][:, None], score.cpu().numpy(), -np.inf)
    return scores


def check_scores(by: str, lab: Lab, method: str) -> None:
    """Refuses scores that there are not, or that the tables' optimizer gives no ground for."""
    if by not in SCORES:
        raise UserError(f"{method}: by must be one of {', '.join(SCORES)}; got {by!r}")
    if by == "impact" and lab.setup.table_optimizer == "sgd":
        raise UserError(f"{method}: by=impact needs the squared gradients that adagrad sums; sgd does not")


def tensors(masks: Masks) -> dict[str, Tensor]:
    """Masks as they are kept in a stage's file."""
    return {name: torch.from_numpy(np.ascontiguousarray(mask)) for name, mask in masks.items()}


def arrays(masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Masks from a stage's file."""
    return {name: mask.numpy() for name, mask in masks.items()}
