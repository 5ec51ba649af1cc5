"""Methods that reorganise themselves while they train, on several processes that must stay of one mind.

Every process has the same integer arrays (pointers, hot map, sketch). They stay the same, because all take note of the
ids of all, and because rank 0 alone reorganises and tells the others what came out. So nothing depends on whether two
processors round alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embtab.methods.base import Encoding, LiveTable
from embtab.sharding.processes import first_says


def everyones(ids: Tensor) -> Tensor:
    """The ids [N] of all processes, rank after rank, on every one of them; N may differ between them."""
    world = dist.get_world_size()
    counts = torch.zeros(world, dtype=torch.int64, device=ids.device)
    counts[dist.get_rank()] = len(ids)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    mine = ids.new_zeros(max(sizes))
    mine[: len(ids)] = ids
    found = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(found, mine)
    return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)])


def reorganise(
    encoding: Encoding, state: Mapping[str, Tensor], arrays: Mapping[str, Tensor], generator: np.random.Generator
) -> None:
    """Rank 0 lets a method change its tables and arrays in place; the others get copies of both.

    Args:
        encoding: of an adaptive method.
        state: its tables [R, W] in full, the same on every process, and "table.optimizer" beside them.
        arrays: its arrays, by name.
        generator: the source of every random choice.

    Raises:
        UserError: on every process, when rank 0 failed.
    """
    device = next(iter(arrays.values())).device
    names = dict.fromkeys(encoding.tables)
    moved = {key: value.to(device).contiguous() for key, value in state.items()}
    tables = {name: LiveTable(moved[name], moved.get(f"{name}.optimizer")) for name in names}
    first_says(lambda: encoding.adapt(tables, arrays, generator))
    for tensor in (*arrays.values(), *moved.values()):
        dist.broadcast(tensor, 0)
    for key, value in state.items():
        value.copy_(moved[key])
