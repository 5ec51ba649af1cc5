"""Checkpoints that all processes write together: a folder, complete or absent, which any number of them can read.

torch.distributed.checkpoint stores tables in the parts that the processes hold, and reads whatever parts other
processes, or another sharding plan, want. Beside it lies `meta.pt`: everything else of Lightning's checkpoint, as
plain types.
On several hosts the folder must be on a file system that all of them share.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from embtab.errors import UserError
from embtab.sharding.processes import first_says, size_of

_META = "meta.pt"


def save(folder: Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint in place of what is at `folder`; called by every process.

    Args:
        folder: to write.
        state: tensors by name, spread over processes or the same on each.
        meta: plain types; those of rank 0 are written.

    Raises:
        UserError: when it cannot be written.
    """
    beside = folder.with_name(f".{folder.name}.tmp")

    def begin() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    def end() -> None:
        with (beside / _META).open("wb") as file:
            torch.save(dict(meta), file)
            file.flush()
            os.fsync(file.fileno())
        old = _old(folder)
        if folder.exists():  # else the old one is all there is, until the new one is in place
            _remove(old)
            os.rename(folder, old)
        os.rename(beside, folder)
        _remove(old)

    first_says(begin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_tensors(dict(state), checkpoint_id=beside)
    first_says(end)


def _old(folder: Path) -> Path:
    """Where the previous checkpoint of this name is while the new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def found(path: str | Path) -> Path:
    """The folder or file at `path`; the one that was there before, where a crash came between the two."""
    folder = Path(path)
    return _old(folder) if not folder.exists() and _old(folder).exists() else folder


def read_meta(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint.

    Raises:
        UserError: when the folder holds no complete checkpoint.
    """
    try:
        meta: dict[str, Any] = torch.load(folder / _META, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{folder}: damaged, or not a checkpoint made by a sharded run") from None
    return meta


def load(folder: Path, state: Mapping[str, Any], optional: Callable[[str], bool]) -> None:
    """Reads tensors in place; called by every process.

    Args:
        folder: of the checkpoint.
        state: where to read to: tensors by name, spread over processes or not.
        optional: says of a name whether the checkpoint may lack it.

    Raises:
        UserError: when the checkpoint lacks a tensor or has one of another shape.
    """
    saved = _tensors(folder)
    wanted = {}
    for name, target in state.items():
        if name not in saved:
            if optional(name):
                continue
            raise UserError(f"{folder}: has no {name!r}; it was made with another model or plan")
        was, now = list(saved[name].size), size_of(target)
        if was != now:
            raise UserError(
                f"{folder}: {name!r} has shape {was} and here {now}; it was made with another plan or optimizer"
            )
        wanted[name] = target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_tensors(wanted, checkpoint_id=folder)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors in full, read by this process alone, tables without padding."""
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in _tensors(folder).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_tensors(state, checkpoint_id=folder, no_dist=True)
    shapes: Mapping[str, Sequence[int]] = read_meta(folder).get("shapes", {})
    for name, shape in shapes.items():
        if name in state:
            for axis, size in enumerate(shape[: state[name].dim()]):
                state[name] = state[name].narrow(axis, 0, size).contiguous()
    return state


def _tensors(folder: Path) -> dict[str, Any]:
    """Sizes and types of the stored tensors, by name."""
    try:
        return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{folder}: damaged, or not a checkpoint made by a sharded run") from None
