"""First values of tables, of which any part can be drawn by anyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embtab.hashing import seed_of
from embtab.methods.base import PartInit
from embtab.methods.storage import Table

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
        found = torch.empty(stop - first, table.width, dtype=torch.float32)
        for block in range(first // BLOCK, -(-stop // BLOCK)):
            low = block * BLOCK
            drawn = torch.empty(min(BLOCK, table.num_rows - low), table.width, dtype=torch.float32)
            drawn.normal_(start.mean, start.std, generator=generator(name, block, self.seed))
            begin, end = max(first, low), min(stop, low + BLOCK)
            found[begin - first : end - first] = drawn[begin - low : end - low]
        return found


def generator(name: str, part: int, seed: int) -> torch.Generator:
    """A source of random numbers of its own for one part of what has this name."""
    return torch.Generator().manual_seed(seed_of(name, part, seed))
