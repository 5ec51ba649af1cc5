"""Rows that are spread over processes, rounded to what serving reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embtab.lookup.base import padded
from embtab.lookup.init import BLOCK
from embtab.methods.storage import Table
from embtab.quantise import served


@torch.no_grad()
def round_shards(shards: Sequence[Any], table: Table, whole_rows: bool) -> None:
    """Rounds this process's part of a table in place; called by every process.

    Args:
        shards: the parts that this process holds, float32 [rows, columns] each, padded to a multiple of 4 columns.
        table: the table.
        whole_rows: whether each part has all columns; scales and offsets are of whole rows.

    Raises:
        ValueError: on every process, when an entry on any of them cannot be stored in the table's precision.
    """
    wrong: list[str | None] = [None] * dist.get_world_size()
    mine = None
    try:
        if whole_rows:
            for shard in shards:
                rows = shard.tensor[:, : table.width]
                rows.copy_(served(rows, table.precision))
        else:
            _round_blocks(shards, table)
    except ValueError as error:
        mine = str(error)
    dist.all_gather_object(wrong, mine)
    said = next((each for each in wrong if each is not None), None)
    if said is not None:
        raise ValueError(said)


def _round_blocks(shards: Sequence[Any], table: Table) -> None:
    """Puts rows that are cut into columns together, some at a time, and takes this process's columns of them."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for low in range(0, table.num_rows, BLOCK):
        block = torch.zeros(min(BLOCK, table.num_rows - low), padded(table.width), device=device)
        pairs = [(_columns(block, shard), shard.tensor[low : low + len(block)]) for shard in shards]
        for columns, rows in pairs:
            columns.copy_(rows)
        dist.all_reduce(block)
        block[:, : table.width] = served(block[:, : table.width], table.precision)
        for columns, rows in pairs:
            rows.copy_(columns)


def _columns(block: Tensor, shard: Any) -> Tensor:
    return block.narrow(1, shard.metadata.shard_offsets[1], shard.tensor.shape[1])
