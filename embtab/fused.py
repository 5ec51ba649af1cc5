"""The optimizer that lookups apply inside backward, seen from outside as a torch optimizer.

A fused table is trained where its gradient arises, so nobody calls `step()` for it. Everything else that users do with
an optimizer works as ever: schedulers drive its learning rate, loggers see it, checkpoints keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from embtab.errors import UserError

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


@dataclass(frozen=True)
class Optimizer:
    """The optimizer that the fbgemm and native backends apply to their tables inside backward.

    Args:
        name: "sgd"; "adagrad" (a second moment per entry); or "rowwise_adagrad" (one per row: the mean of squares).
        lr: learning rate.
        eps: added to the root of the second moment; unused by sgd.
        weight_decay: L2 penalty on the rows of a batch: this much of a row is added to its gradient.
        max_gradient: entries of the gradient of every looked-up sum are clamped to [-max_gradient, max_gradient], as
            fbgemm does; None for no clamp.

    Raises:
        UserError: for an unknown name, or a number that is not finite or below zero.
    """

    name: str = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_gradient: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(f"table optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}")
        for what in ("lr", "eps", "weight_decay"):
            value = getattr(self, what)
            if not 0 <= value < math.inf:
                raise UserError(f"table optimizer: {what} must be zero or more and finite, got {value!r}")
        if self.max_gradient is not None and not self.max_gradient > 0:
            raise UserError(f"table optimizer: max_gradient must be above zero, got {self.max_gradient!r}")


class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer of fused tables: one parameter group whose numbers the next backward uses.

    The group lists no parameters: rows are updated inside backward, and what the optimizer remembers of them is saved
    with the tables. `step()` only runs the closure it is given.

    Args:
        settings: the first values.
    """

    def __init__(self, settings: Optimizer) -> None:
        defaults = {
            "optimizer": settings.name,
            "lr": settings.lr,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "max_gradient": settings.max_gradient,
        }
        super().__init__([{"params": []}], defaults)

    @property
    def settings(self) -> Optimizer:
        """The group's numbers as they are now.

        Raises:
            UserError: when somebody wrote a number there that is none, such as a negative learning rate.
        """
        group = self.param_groups[0]
        return Optimizer(
            group["optimizer"], float(group["lr"]), group["eps"], group["weight_decay"], group["max_gradient"]
        )

    def set_learning_rate(self, lr: float) -> None:
        """Changes the learning rate from the next backward on.

        Raises:
            UserError: when it is negative or not finite.
        """
        Optimizer(self.defaults["optimizer"], lr)
        self.param_groups[0] |= {name: lr for name in ("lr", "initial_lr") if name in self.param_groups[0]}

    @property
    def base_lr(self) -> float:
        """The learning rate; where a schedule drives it, the one that its factors multiply."""
        return float(self.param_groups[0].get("initial_lr", self.param_groups[0]["lr"]))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The result of the closure; the tables were updated when their gradients arose."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the saved numbers.

        Raises:
            UserError: when they were saved by another optimizer.
        """
        (saved,) = state_dict["param_groups"]
        mine = self.param_groups[0]
        if saved.get("optimizer") != mine["optimizer"]:
            raise UserError(
                f"the saved tables were trained by {saved.get('optimizer')!r} and these are by {mine['optimizer']!r}; "
                "use the optimizer they were made with"
            )
        mine |= {key: value for key, value in saved.items() if key != "params"}


class WithTables(torch.optim.Optimizer):
    """An optimizer and the fused optimizers of tables as one, whose groups are those of all; see `with_tables`.

    A saved state brings its learning rates along, unless they were set otherwise since: then the new ones hold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fused: list[FusedOptimizer]) -> None:
        self.parts = [optimizer, *fused]
        super().__init__(self._groups(), {})
        self.first = [float(group["lr"]) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer; the tables have made theirs."""
        return self.parts[0].step(closure)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer."""
        if any(param_group is group for group in self._groups()):  # in the constructor
            super().add_param_group(param_group)
            return
        self.parts[0].add_param_group(param_group)
        self.param_groups[:] = self._groups()

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, and the learning rates they began with."""
        return {"parts": [part.state_dict() for part in self.parts], "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of the parts.

        Raises:
            UserError: when they were saved by other optimizers, or for other parameters.
        """
        saved = state_dict.get("parts", [])
        if len(saved) != len(self.parts):
            raise UserError(
                "the saved optimizer state belongs to another optimizer, backend or number of collections; continue "
                "with those it was made with"
            )
        for part, state in zip(self.parts, saved, strict=True):
            try:
                part.load_state_dict(state)
            except (ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"the saved optimizer state does not fit the ranker's parameters: {error}") from error
        self.param_groups[:] = self._groups()
        self.state = self.parts[0].state
        for group, mine, theirs in zip(self.param_groups, self.first, state_dict["first"], strict=False):
            if mine != theirs:
                group["lr"] = mine
            group["initial_lr"] = mine


def fused_optimizers(module: nn.Module) -> list[FusedOptimizer]:
    """The optimizers of the fused tables inside a module, each once."""
    found = [getattr(each, "fused", None) for each in module.modules()]
    return list({id(each): each for each in found if isinstance(each, FusedOptimizer)}.values())


def outer_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module that an optimizer outside has to train: all but fused tables."""
    inside = {
        id(parameter)
        for each in module.modules()
        if isinstance(getattr(each, "fused", None), FusedOptimizer)
        for parameter in each.parameters()
    }
    yield from (parameter for parameter in module.parameters() if id(parameter) not in inside)


def with_tables(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer together with those of all fused tables in a module, so that one schedule drives them all.

        optimizer = et.with_tables(torch.optim.Adam(et.outer_parameters(model), lr=1e-3), model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

    Args:
        optimizer: of the other parameters.
        module: holds collections with fused tables.

    Returns:
        An optimizer with the groups of all.
    """
    return WithTables(optimizer, fused_optimizers(module))
