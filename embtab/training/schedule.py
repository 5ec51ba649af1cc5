"""Learning-rate schedules: the factor of every group's learning rate, tables and ranker alike, by training step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from embtab.errors import UserError

Name = Literal["constant", "cosine", "linear", "step"]


@dataclass(frozen=True)
class Schedule:
    """How learning rates move while training. Steps are the optimizer's, counted over all epochs.

    Args:
        name: "constant"; "cosine" or "linear", from 1 down to `floor` at the end of training; or "step", times `gamma`
            every `every` steps.
        warmup_steps: steps in which the factor first rises from 1 / warmup_steps to 1.
        every: of "step".
        gamma: of "step".
        floor: the smallest factor.

    Raises:
        UserError: for a number that makes no sense.
    """

    name: Name = "constant"
    warmup_steps: int = 0
    every: int = 1000
    gamma: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        names = ("constant", "cosine", "linear", "step")
        if self.name not in names:
            raise UserError(f"schedule: name must be one of {', '.join(names)}; got {self.name!r}")
        if self.warmup_steps < 0:
            raise UserError(f"schedule: warmup_steps must be zero or more, got {self.warmup_steps}")
        if self.every < 1:
            raise UserError(f"schedule: every must be at least 1, got {self.every}")
        for what in ("gamma", "floor"):
            if not 0 <= getattr(self, what) <= 1:
                raise UserError(f"schedule: {what} must be between 0 and 1, got {getattr(self, what)}")

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the length of training."""
        return self.name in ("cosine", "linear")

    def factor(self, step: int, total: float) -> float:
        """What learning rates are multiplied by in a step.

        Args:
            step: from 0.
            total: steps of the whole training; only for what `needs_total`.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        after = step - self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "step":
            return max(self.floor, self.gamma ** (after // self.every))
        done = min(1.0, after / max(1, total - self.warmup_steps))
        shape = (1 + math.cos(math.pi * done)) / 2 if self.name == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * shape

    def of(self, optimizer: torch.optim.Optimizer, total: float) -> torch.optim.lr_scheduler.LRScheduler:
        """The scheduler, to be stepped after every step of the optimizer.

        Args:
            optimizer: of the ranker, joined with those of fused tables (see `embtab.with_tables`).
            total: steps of the whole training.

        Raises:
            UserError: when the length of training is not known, and has to be.
        """
        if self.needs_total and not math.isfinite(total):
            raise UserError(f"schedule {self.name!r} ends with training: set the Trainer's max_epochs or max_steps")
        return _Factors(optimizer, lambda step: self.factor(step, total))


class _Factors(torch.optim.lr_scheduler.LambdaLR):
    """Factors of the learning rates that were configured for this run, also where it goes on from a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return {name: value for name, value in super().state_dict().items() if name != "base_lrs"}
