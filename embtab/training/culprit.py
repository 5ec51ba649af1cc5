"""Where numbers that are not finite come from, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from embtab.datasets.reader import Batch

REMEDY = "lower lr or table_lr, or look for huge values in the dense columns"
_HUGE = 1e4
"""Dense values beyond it are worth a word: rankers expect numbers of about one."""


def culprit(batch: Batch, dense: Sequence[str], vectors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """What made the loss of a batch infinite or NaN: the first of its columns, features and weights that is not finite
    itself, else the largest dense value.

    Args:
        batch: the batch.
        dense: names of the dense columns, where they are known.
        vectors: what the tables give for the batch, by feature.
        weights: of the ranker, by name.
    """
    names = [repr(name) for name in dense] or [str(i) for i in range(batch.dense.shape[1])]
    columns = {f"dense column {name}": each for name, each in zip(names, batch.dense.unbind(1), strict=True)}
    inputs = {**columns, "the label": batch.label, **{f"feature {name!r}": each for name, each in vectors.items()}}
    wrong = not_finite(inputs)
    if wrong is not None:
        rows = inputs[wrong].reshape(len(inputs[wrong]), -1).isfinite().all(1)
        return f"{wrong} is not finite" + (f" in row {int(rows.int().argmin())}" if len(rows) == len(batch) else "")
    wrong = not_finite(weights)
    if wrong is not None:
        return f"the ranker's {wrong} is not finite"
    largest, column = max(((float(each.abs().max()), name) for name, each in columns.items()), default=(0.0, ""))
    return f"{column} holds {largest:.3g}" if largest > _HUGE else "its inputs and weights are finite, and too large"


def not_finite(state: Mapping[str, Any]) -> str | None:
    """The first tensor that holds NaN or infinity; of those that are spread over processes, in this one's part."""
    for name, value in state.items():
        for part in _parts(value):
            # aminmax hands NaN on and, unlike isfinite, takes no memory beside a table.
            if part.is_floating_point() and part.numel() and not all(map(torch.isfinite, part.aminmax())):
                return name
    return None


def _parts(value: Any) -> list[Tensor]:
    """The tensors of an entry that lie in this process."""
    if hasattr(value, "local_shards"):
        return [shard.tensor.detach() for shard in value.local_shards()]
    if isinstance(value, DTensor):
        return [value.to_local().detach()]
    return [value.detach()] if isinstance(value, Tensor) else []
