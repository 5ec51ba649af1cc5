"""Tables that learn their own shape while they are trained, within a byte budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embtab.learned.claim import settings
    from embtab.learned.registry import LEARNED
    from embtab.learned.search import Reference, Result, run, train_dense

_HOMES = {"LEARNED": "registry", "Reference": "search", "Result": "search", "run": "search", "settings": "claim"}
_HOMES |= {"train_dense": "search"}

__all__ = ["LEARNED", "Reference", "Result", "run", "settings", "train_dense"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embtab.learned' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"embtab.learned.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
