"""The names by which Lightning knows our strategy: Trainer(strategy="torchrec"), "embtab.TorchRecStrategy"."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

NAMES = ("torchrec", "torchrecstrategy", "embtab.torchrecstrategy")
"""In small letters, as Lightning compares them."""


def register() -> None:
    """Makes the names known, once."""
    for name in NAMES:
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _made, description="embtab's tables spread over processes by torchrec")


def _made(**options: Any) -> Any:
    """The strategy; torchrec's machinery is imported when it is needed."""
    from embtab.sharding.strategy import TorchRecStrategy

    return TorchRecStrategy(**options)
