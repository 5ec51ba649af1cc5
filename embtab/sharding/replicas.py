"""Tables that every process holds in full, trained inside backward like the sharded ones: small ones are best so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embtab.fused import FusedOptimizer
from embtab.lookup.base import Request
from embtab.lookup.torch import TorchLookup
from embtab.methods.storage import Table


class Replicas(TorchLookup):
    """Plain tables whose gradients are averaged over processes, then applied, when backward ends.

    One all-reduce a width and step, of as many bytes as the tables have.

    Args:
        tables: the physical tables.
        device: of this process.
        fused: what backward does with the rows that were read; the same numbers as the fbgemm backend's.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device, fused: FusedOptimizer) -> None:
        super().__init__(tables, device)
        self.fused = fused
        self._leaves = {width: nn.Parameter(stack) for width, stack in self._stacks.items()}
        self._due = False
        self._moments: dict[int, Tensor] = {}
        for width, rows in self.stacked_rows.items():
            shape = {"sgd": (0,), "adagrad": (rows, width), "rowwise_adagrad": (rows,)}[fused.settings.name]
            self._moments[width] = torch.zeros(shape, device=device)

    @torch.no_grad()
    def agree(self) -> None:
        """Gives every process the values of rank 0."""
        for tensor in (*self._stacks.values(), *self._moments.values()):
            dist.broadcast(tensor, 0)

    def matrix(self, width: int) -> Tensor:
        """The leaf whose gradient is averaged over processes."""
        return self._leaves[width]

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers as `TorchLookup`; backward through an answer trains the tables of all processes."""
        answers = super().forward(requests)
        for answer in answers:
            if answer.requires_grad:
                answer.register_hook(self._when_backward_ends)
        return answers

    def _when_backward_ends(self, gradient: Tensor) -> None:
        if not self._due:
            self._due = True
            torch.autograd.Variable._execution_engine.queue_callback(self._step)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step(self) -> None:
        self._due = False
        for width in self.stacked_rows:
            weight = self._leaves[width]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = None
            dist.all_reduce(gradient)
            self._train(width, weight, gradient / dist.get_world_size())

    def _train(self, width: int, weight: Tensor, gradient: Tensor) -> None:
        settings = self.optimizer
        if settings.name == "sgd":
            weight.add_(gradient, alpha=-settings.lr)
            return
        moment = self._moments[width]
        if settings.name == "adagrad":
            root = moment.addcmul_(gradient, gradient).sqrt()
        else:
            root = moment.add_(gradient.square().mean(1)).sqrt().unsqueeze(1)
        weight.addcdiv_(gradient, root + settings.eps, value=-settings.lr)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments, as in the fbgemm backend."""
        if self.optimizer.name == "sgd":
            return {}
        return {
            name: self._moments[table.width][self.base[name] : self.base[name] + table.num_rows]
            for name, table in self.tables.items()
        }
