"""Checkpoints that all processes write together: a folder, complete or absent, which any number of them can read.

torch.distributed.checkpoint stores tables in the parts that the processes hold, and reads whatever parts other
processes, or another sharding plan, want. Beside it lies `meta.pt`: everything else of Lightning's checkpoint, as
plain types.
On several hosts the folder must be on a file system that all of them share.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from embtab.errors import UserError
from embtab.sharding.metadata import Reader
from embtab.sharding.processes import first_says, size_of
from embtab.torch_files import load_plain

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
        _remove(beside)
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
    if path.is_dir() and not path.is_symlink():
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
    meta = load_plain(folder / _META, _damaged(folder))
    if not isinstance(meta, dict):
        raise UserError(_damaged(folder))
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
    reader = Reader(folder)
    saved = reader.tensors
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
    with _reading(folder):
        read_tensors(wanted, storage_reader=reader)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors in full, read by this process alone, tables without padding.

    Raises:
        UserError: when the folder is damaged, or no checkpoint.
    """
    reader = Reader(folder)
    state: dict[str, Any] = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in reader.tensors.items()
    }
    with _reading(folder):
        read_tensors(state, storage_reader=reader, no_dist=True)
    for name, shape in _shapes(folder).items():
        if name in state:
            for axis, size in enumerate(shape[: state[name].dim()]):
                state[name] = state[name][(slice(None),) * axis + (slice(size),)].contiguous()
    return state


def _shapes(folder: Path) -> Mapping[str, Sequence[int]]:
    """Of every table without its padding, by name."""
    shapes = read_meta(folder).get("shapes", {})
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
        for shape in shapes.values()
    ):
        raise UserError(_damaged(folder))
    return shapes


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says in a line what torch says of files that are damaged, or hold something other than tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException:
            raise UserError(_damaged(folder)) from None


def _damaged(folder: Path) -> str:
    return f"{folder}: damaged, or not a checkpoint made by a sharded run"
