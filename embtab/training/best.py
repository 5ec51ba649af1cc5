"""The checkpoints that `embtab fit` keeps: of the best epoch, also of runs that it goes on from, and the last one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from embtab.files import replaced_file


class Best(ModelCheckpoint):
    """Keeps the epoch of the highest val/auc as best-stepN.ckpt.

    A run that goes on has a folder of its own, where Lightning would begin anew: a later and worse epoch would be the
    best one there. The best so far is taken along instead.
    """

    def __init__(self) -> None:
        super().__init__(monitor="val/auc", mode="max", filename="best-step{step}", auto_insert_metric_name=False)

        self._source: Path | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Learns where the checkpoint lies that training goes on from."""
        self._source = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve().parent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the best checkpoint into this run's folder, from beside the checkpoint that training goes on from; one
        that is gone, elsewhere, or spread over a folder, is not taken along.
        """
        earlier, folder = Path(state_dict["best_model_path"]), self.dirpath
        if folder is not None and folder != state_dict["dirpath"] and self._is_beside(earlier):
            mine, score = str(Path(folder) / earlier.name), state_dict["best_model_score"]
            with replaced_file(Path(mine)) as beside:
                shutil.copyfile(earlier, beside)
            paths = {"best_model_path": mine, "kth_best_model_path": mine, "last_model_path": ""}
            state_dict = state_dict | paths | {"dirpath": folder, "kth_value": score, "best_k_models": {mine: score}}
        super().load_state_dict(state_dict)

    def _is_beside(self, earlier: Path) -> bool:
        return earlier.parent.resolve() == self._source and earlier.is_file() and not earlier.is_symlink()


class Last(ModelCheckpoint):
    """Keeps where training stands as last.ckpt: a class of its own, beside checkpoints that the user asks for."""

    def __init__(self, **when: Any) -> None:
        super().__init__(filename="last", enable_version_counter=False, **when)


def only_plain_paths(callbacks: Any, checkpoint: str | Path | None) -> None:
    """Forgets paths in the states of callbacks that lead elsewhere than they seem to.

    Lightning removes earlier checkpoints by the paths that a checkpoint names: those that begin with the run's folder
    (and may go up again from there), and those of other file systems. What stays is plain local paths, and what lies
    where the checkpoint itself does.

    Args:
        callbacks: the states of a checkpoint, changed in place.
        checkpoint: where it was read from.
    """
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, dict) or "best_model_path" not in state:
            continue
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if not _is_plain(state.get(name), checkpoint):
                state[name] = ""
        best = state.get("best_k_models")
        best = best if isinstance(best, dict) else {}
        state["best_k_models"] = {path: score for path, score in best.items() if _is_plain(path, checkpoint)}


def _is_plain(path: Any, checkpoint: str | Path | None) -> bool:
    if not isinstance(path, str) or ".." in Path(path).parts:
        return False
    is_local = "::" not in path and "://" not in path
    return is_local or os.path.dirname(path) == os.path.dirname(str(checkpoint))
