"""The lookup backends by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import Lookup
from embtab.lookup.torch import TorchLookup
from embtab.methods.storage import Table


def make_lookup(
    tables: Sequence[Table], backend: str, device: torch.device | str, optimizer: Optimizer | None
) -> Lookup:
    """The backend of a name.

    Raises:
        UserError: for an unknown backend, or a table optimizer with the torch backend.
    """
    if backend == "fbgemm":
        from embtab.lookup.fbgemm import FbgemmLookup

        return FbgemmLookup(tables, device, FusedOptimizer(optimizer or Optimizer()))
    if backend == "native":
        from embtab.lookup.native import NativeLookup, check_device

        check_device(torch.device(device))
        return NativeLookup(tables, FusedOptimizer(optimizer or Optimizer()))
    if backend == "torch":
        if optimizer is not None:
            raise UserError("the torch backend has no optimizer of its own; give tables.parameters() to a torch one")
        return TorchLookup(tables, device)
    hint = "; tables are sharded by the Trainer's strategy, embtab.TorchRecStrategy()" if backend == "torchrec" else ""
    raise UserError(f"unknown lookup backend {backend!r}; there are torch, fbgemm and native{hint}")
