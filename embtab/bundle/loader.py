"""Bundles back into memory, as tables that train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from embtab.planning.stored import plan_of
from embtab.reader import Bundle
from embtab.tables import EmbeddingBagCollection
from embtab.tables.base import Collection

C = TypeVar("C", bound=Collection)


@torch.no_grad()
def load(
    path: str | Path,
    backend: str = "torch",
    collection: type[C] = EmbeddingBagCollection,  # type: ignore[assignment]
    deltas: Sequence[str | Path] = (),
) -> C:
    """The tables of a bundle, with the values that serving reads; sha256 of all files compared.

    Args:
        path: a folder that `save` wrote.
        backend: "torch", "fbgemm" or "native".
        collection: `EmbeddingCollection` for vectors that are not pooled.
        deltas: folders that `save_delta` wrote, in order.

    Raises:
        UserError: when the bundle is damaged, or comes from a method that this embtab does not have.
    """
    opened = Bundle(path, deltas=deltas)
    tables = collection(plan_of(opened), backend=backend, init_std=None)
    for name in tables.plan.tables:
        rows, target = opened.tables[name], tables.lookup.table(name)
        for first in range(0, len(target), 2**16):
            target[first : first + 2**16] = torch.from_numpy(np.array(rows[first : first + 2**16]))
    for name, array in tables.arrays.named_state().items():
        array.copy_(torch.from_numpy(np.array(opened.tables[name])))
    return tables
