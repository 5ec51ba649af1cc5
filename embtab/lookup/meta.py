"""Tables that wait for someone to hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import Lookup, Request
from embtab.lookup.init import Draw
from embtab.methods.storage import Table


class Unmade(Lookup):
    """Tables that take no memory, on the meta device: whoever takes their place draws the values of the part it holds.

    Args:
        tables: the physical tables.
        optimizer: for the lookup that takes their place; that of the fbgemm backend if None.
    """

    backend: ClassVar[str] = "meta"

    def __init__(self, tables: Sequence[Table], optimizer: Optimizer | None) -> None:
        super().__init__(tables, FusedOptimizer(optimizer or Optimizer()))
        self.draw: Draw | None = None

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Impossible.

        Raises:
            UserError: always.
        """
        raise UserError(
            "tables on the meta device hold no rows; give the Trainer strategy=embtab.TorchRecStrategy(), which makes "
            "each process's part of them, or make them on a device that has memory"
        )

    def table(self, name: str) -> Tensor:
        """The table's shape."""
        return torch.empty(self.tables[name].num_rows, self.tables[name].width, dtype=torch.float32, device="meta")

    def optimizer_state(self) -> dict[str, Tensor]:
        """Nothing yet."""
        return {}

    def named_state(self) -> dict[str, Tensor]:
        """Nothing yet."""
        return {}

    def fill(self, draw: Draw) -> None:
        """Keeps in mind what is to be drawn."""
        self.draw = draw

    def hand_over(self, other: Lookup) -> None:
        """Lets the other draw."""
        if self.draw is not None:  # else the other's rows stay zero
            other.fill(self.draw)
        other.freeze(self.frozen())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unmade:
        return self
