"""First values of tables of which any part can be drawn by anyone; and tables that wait for someone to hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.hashing import seed_of
from embtab.lookup import Lookup, Optimizer, Request
from embtab.methods import Table
from embtab.methods.base import PartInit

BLOCK = 1024
"""Rows that are drawn together: a generator for each would cost more than its numbers."""


@dataclass(frozen=True)
class Draw:
    """Normally distributed tables: each row a function of seed, table name and row number, whoever draws it.

    Args:
        tables: the physical tables, by name.
        starts: mean and standard deviation of each.
        seed: any int64.
    """

    tables: Mapping[str, Table]
    starts: Mapping[str, PartInit]
    seed: int

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """float32 [stop - first, W]: the rows [first, stop) of a table."""
        table, start = self.tables[name], self.starts[name]
        found = torch.empty(stop - first, table.width)
        for block in range(first // BLOCK, -(-stop // BLOCK)):
            low = block * BLOCK
            drawn = torch.empty(min(BLOCK, table.num_rows - low), table.width)
            drawn.normal_(start.mean, start.std, generator=generator(name, block, self.seed))
            begin, end = max(first, low), min(stop, low + BLOCK)
            found[begin - first : end - first] = drawn[begin - low : end - low]
        return found


def generator(name: str, part: int, seed: int) -> torch.Generator:
    """A source of random numbers of its own for one part of what has this name."""
    return torch.Generator().manual_seed(seed_of(name, part, seed))


class Unmade(Lookup):
    """Tables that take no memory, on the meta device: whoever takes their place draws the values of the part it holds.

    Args:
        tables: the physical tables.
        optimizer: for the lookup that takes their place; that of the fbgemm backend if None.
    """

    def __init__(self, tables: Sequence[Table], optimizer: Optimizer | None) -> None:
        super().__init__(tables)
        self.optimizer = optimizer or Optimizer()
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
        return torch.empty(self.tables[name].num_rows, self.tables[name].width, device="meta")

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
        assert self.draw is not None
        other.fill(self.draw)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unmade:
        return self
