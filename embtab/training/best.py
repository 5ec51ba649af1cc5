"""The checkpoints that `embtab fit` keeps: of the best epoch, also of runs that it goes on from, and the last one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from embtab.files import replaced_file


class Best(ModelCheckpoint):
    """Keeps the epoch of the highest val/auc as best-stepN.ckpt.

    A run that goes on has a folder of its own, where Lightning would begin anew: a later and worse epoch would be the
    best one there. The best so far is taken along instead.
    """

    def __init__(self) -> None:
        super().__init__(monitor="val/auc", mode="max", filename="best-step{step}", auto_insert_metric_name=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the best checkpoint into this run's folder; one that is gone, or spread over a folder, stays there."""
        earlier, folder = Path(state_dict["best_model_path"]), self.dirpath
        if folder is not None and folder != state_dict["dirpath"] and earlier.is_file():
            mine, score = str(Path(folder) / earlier.name), state_dict["best_model_score"]
            with replaced_file(Path(mine)) as beside:
                shutil.copyfile(earlier, beside)
            paths = {"best_model_path": mine, "kth_best_model_path": mine, "last_model_path": ""}
            state_dict = state_dict | paths | {"dirpath": folder, "kth_value": score, "best_k_models": {mine: score}}
        super().load_state_dict(state_dict)


class Last(ModelCheckpoint):
    """Keeps where training stands as last.ckpt: a class of its own, beside checkpoints that the user asks for."""

    def __init__(self, **when: Any) -> None:
        super().__init__(filename="last", enable_version_counter=False, **when)
