"""What one process decides or does for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from embtab.errors import UserError

T = TypeVar("T")


def first_says(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank; an error of rank 0 is raised on every rank, so that none waits for it.

    Raises:
        UserError: when rank 0 failed.
    """
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = compute()
        except Exception as error:
            said[1] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise UserError(said[1])
    result: T = said[0]
    return result


def size_of(value: Any) -> list[int]:
    """Of a tensor in one piece, or one that is spread (whose own `size()` warns that torch will drop its class)."""
    return list(value.metadata().size if hasattr(value, "local_shards") else value.shape)


@torch.no_grad()
def whole(value: Any, size: Sequence[int]) -> Tensor:
    """A tensor of this size that is spread over processes (None where this one has no part), in full on every one."""
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        return value.detach().cpu().clone()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    full = torch.zeros(*size, device=device)
    for shard in [] if value is None else value.local_shards():
        part = full
        for axis, start in enumerate(shard.metadata.shard_offsets):
            part = part.narrow(axis, start, shard.tensor.shape[axis])
        part.copy_(shard.tensor)
    dist.all_reduce(full)
    return full.cpu()
