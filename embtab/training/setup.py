"""What one training of a ranker is set up with: data, ranker, optimizers; comparisons and searches share it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

import embtab.models
from embtab.errors import UserError


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that decides a training but its tables and its seed."""

    data: str
    """A folder made by `embtab prepare`."""
    _: KW_ONLY
    dim: int = 16
    """Width of every embedding."""
    model: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=lambda: {"name": "AutoInt"})
    """The ranker: `name` of a class of embtab.models, and its options; or a list of rankers, each with all cells."""
    epochs: int = 1
    """At most; training stops after an epoch that is worse on the validation split than `patience` before it."""
    patience: int = 1
    batch_size: int = 4096
    lr: float = 1e-3
    """Adam's learning rate for the ranker."""
    weight_decay: float = 0.0
    """Adam's weight decay for the ranker."""
    table_optimizer: str = "rowwise_adagrad"
    table_lr: float = 0.05
    init_std: float = 0.01
    """Standard deviation of the entries of every embedding at the start."""

    @property
    def training(self) -> dict[str, Any]:
        """The settings that change a result, beyond data, plan and seed."""
        names = ["model", "epochs", "patience", "batch_size", "lr", "weight_decay"]
        names += ["table_optimizer", "table_lr", "init_std"]
        return {name: getattr(self, name) for name in names}


def check_training(seeds: Sequence[int], **settings: float) -> None:
    """Refuses what no run can be trained with, before any begins.

    Args:
        seeds: of the runs.
        settings: by name, such as `lr` (above zero), `weight_decay` or `init_std` (zero or more).

    Raises:
        UserError: naming the first wrong one.
    """
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"seeds must be whole numbers from 0 and below 2^32, got {seed}")
    for name, value in settings.items():
        if not (0 < value < math.inf if name == "lr" else 0 <= value < math.inf):
            kind = "above zero" if name == "lr" else "zero or more"
            raise UserError(f"{name} must be a finite number, {kind}; got {value}")


def make_model(setup: TrainingSetup, num_dense: int, num_features: int) -> torch.nn.Module:
    """The ranker by name, with only options it has.

    Raises:
        UserError: for an unknown name or option, or a value the ranker refuses.
    """
    assert isinstance(setup.model, Mapping)
    options = dict(setup.model)
    name = options.pop("name", None)
    classes = {
        key: value
        for key, value in vars(embtab.models).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and value not in embtab.models.SEQUENCE_MODELS
    }
    if name not in classes:
        raise UserError(f"unknown model {name!r}; there are {', '.join(classes)}")
    known = list(inspect.signature(classes[name]).parameters)[3:]
    for option in options:
        if option not in known:
            raise UserError(f"model {name} has no option {option!r}; it has {', '.join(known)}")
    return classes[name](num_dense, num_features, setup.dim, **options)
