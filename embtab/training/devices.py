"""How many processes a command trains on, and by which strategy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import nn

from embtab.training.contract import fused


def placed(settings: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Changes to the Trainer's settings: the processes that torchrun started, and fused tables spread over them.

    Args:
        settings: of the Trainer, as the command line and the configuration give them.
        module: what is trained.
    """
    found: dict[str, Any] = {}
    if TorchElasticEnvironment.detect() and settings["devices"] == "auto":
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        found = {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}
    if settings["strategy"] == "auto" and any(fused(each) for each in module.modules()):
        asked = {name: settings[name] for name in ("accelerator", "devices", "num_nodes")} | found
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        if L.Trainer(**asked, **quiet).world_size > 1:
            found["strategy"] = "torchrec"
    return found
