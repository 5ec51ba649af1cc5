"""Lookups by plain torch: the tables are parameters, which any torch optimizer trains. The reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.lookup.named_state import at
from embtab.lookup.stacked import SummingLookup
from embtab.methods.storage import Table


class TorchLookup(SummingLookup):
    """Tables that are parameters, one each.

    Args:
        tables: the physical tables.
        sparse: give sparse gradients, for torch.optim.SparseAdam, SGD and Adagrad.
    """

    backend: ClassVar[str] = "torch"

    def __init__(self, tables: Sequence[Table], device: torch.device | str, sparse: bool = False) -> None:
        super().__init__(tables)
        self.sparse = sparse
        self._stacks = {
            width: torch.zeros(rows, width, dtype=torch.float32, device=device)
            for width, rows in self.stacked_rows.items()
        }
        self.list_tables()

    def stack(self, width: int) -> Tensor:
        """The matrix of this width."""
        return self._stacks[width]

    def matrix(self, width: int) -> Tensor:
        """The same, through which gradients reach the parameters."""
        parameters = [at(self.places[name]) for name, table in self.tables.items() if table.width == width]
        if len(parameters) == 1:
            return parameters[0]
        if torch.compiler.is_compiling() or not _side_by_side(parameters, self._stacks[width]):
            return torch.cat(parameters)  # torch.func has put other tensors in their place
        matrix: Tensor = _Stacked.apply(self._stacks[width], *parameters)
        return matrix

    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Sums by torch's own embedding bag."""
        matrix = self.matrix(width)
        return F.embedding_bag(
            rows,
            matrix,
            torch.arange(len(rows) + 1, device=rows.device) if offsets is None else offsets,
            mode="sum",
            sparse=self.sparse,
            per_sample_weights=None if weights is None else weights.to(matrix.dtype),
            include_last_offset=True,
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Empty: the optimizer is the user's."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchLookup:
        """Follows `.to(...)`: the stacks move, and the parameters stay views of them."""
        self._stacks = {width: fn(stack) for width, stack in self._stacks.items()}
        self.relist()
        for parameter in self.listed.values():
            if parameter.grad is not None:
                parameter.grad = fn(parameter.grad)
        return self


def _side_by_side(parameters: Sequence[Tensor], stack: Tensor) -> bool:
    """Whether parameters are the rows of a stack, one after the other."""
    at = stack.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != at or parameter.dtype != stack.dtype:
            return False
        at += parameter.numel() * parameter.element_size()
    return True


class _Stacked(torch.autograd.Function):
    """Parameters that lie side by side, as one matrix without a copy."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [len(parameter) for parameter in parameters]
        return stack.view_as(stack)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_split_sparse if gradient.is_sparse else torch.split)(gradient, ctx.sizes)


def _split_sparse(gradient: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """A sparse matrix [R, W] cut into so many rows each."""
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    starts = torch.tensor([0, *sizes]).cumsum(0).to(rows.device)
    ends = torch.searchsorted(rows, starts).tolist()
    parts = zip(starts.tolist(), sizes, pairwise(ends), strict=False)
    return tuple(
        torch.sparse_coo_tensor(rows[a:b].unsqueeze(0) - start, values[a:b], (size, values.shape[1]))
        for start, size, (a, b) in parts
    )
