"""What embtab keeps in a checkpoint beside Lightning's own entries, and how it is read: plain types, never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from embtab.errors import UserError, shown
from embtab.files import replaced_file
from embtab.planning import Plan
from embtab.planning.checks import check_arrays
from embtab.tables import EmbeddingBagCollection, EmbeddingCollection
from embtab.torch_files import load_plain

_PACKAGES = ("embtab", "torch", "fbgemm-gpu", "torchrec", "lightning")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside, and renames it.

    Lightning writes among the system's temporary files. Where those are on another disk, what follows is a copy, and a
    kill in its midst leaves half a checkpoint in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replaces the file at `path` in one step; what is no local file is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced_file(Path(path)) as beside, beside.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Reads a file; or the folder that many processes wrote, in full."""
        if "://" not in str(path) and not Path(path).is_file():
            return read_checkpoint(path)
        found: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        return found


def description(plan: Plan | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's "embtab" entry: plan, facts about the run, versions and the state of the random generator."""
    return {
        "format": 1,
        "plan": None if plan is None else plan.to_dict(),
        "about": dict(about),
        "versions": {name: version(name) for name in _PACKAGES},
        "random_state": torch.get_rng_state(),
    }


def described(checkpoint: Mapping[str, Any], path: str | Path = "checkpoint") -> dict[str, Any]:
    """The "embtab" entry of a loaded checkpoint.

    Raises:
        UserError: when there is none, or it comes from a newer version.
    """
    entry = checkpoint.get("embtab")
    if (
        not isinstance(entry, dict)
        or entry.get("format") != 1
        or not isinstance(entry.get("plan", 0), dict | None)
        or not isinstance(entry.get("about"), dict)
    ):
        raise UserError(f"{path}: not a checkpoint that this embtab wrote; give one made by `embtab fit`")
    return entry


def check_data(about: Mapping[str, Any], fingerprint: str | None, remedy: str) -> None:
    """Makes sure that ids mean the values that tables were trained on.

    Args:
        about: of the checkpoint.
        fingerprint: of the data at hand; None where it is not known.
        remedy: the option by which a user who knows that ids mean the same takes it all the same.

    Raises:
        UserError: when it is other data.
    """
    trained = about.get("fingerprint")
    if trained is not None and fingerprint is not None and trained != fingerprint:
        raise UserError(
            f"the checkpoint was trained on other data ({about.get('dataset')}, fingerprint {trained}; here it is "
            f"{fingerprint}), where ids may mean other values; give that folder, or {remedy} where they mean the same"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, tensors left on disk until they are used; the folder of a sharded run is read in full.

    Raises:
        UserError: when the file is absent, damaged or not made by embtab.
    """
    if not Path(path).is_file():
        from embtab.sharding import checkpoint as folders

        path = folders.found(path)
        if path.is_dir():
            checkpoint = {**folders.read_meta(path), "state_dict": folders.read_whole(path)}
            described(checkpoint, path)
            return checkpoint
    if not Path(path).exists():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint = load_plain(Path(path), f"{path}: damaged, or not a checkpoint made by `embtab fit`", mmap=True)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint made by `embtab fit`")
    described(checkpoint, path)
    _check_tensors(checkpoint.get("state_dict"), path)
    return checkpoint


def _check_tensors(state: Any, path: str | Path) -> None:
    """Tensors by name, each with all the memory that its shape says (a view may repeat a single number for ever)."""
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint made by `embtab fit` (no state_dict)")
    for name, tensor in state.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.nbytes > tensor.untyped_storage().nbytes()
        ):
            raise UserError(f"{path}: {shown(name)} in state_dict is no whole tensor")


def load_tables(
    path: str | Path, backend: str = "torch", part: str = "tables"
) -> EmbeddingBagCollection | EmbeddingCollection:
    """The trained tables of a checkpoint.

    Args:
        path: the checkpoint.
        backend: of the tables.
        part: "tables", or "attention" for those that a sequence model has for its attention alone.

    Returns:
        An `EmbeddingCollection` where a feature is a history (pooling "none"), else an `EmbeddingBagCollection`.

    Raises:
        UserError: when the checkpoint cannot be read, or was made without a plan of that part.
    """
    checkpoint = read_checkpoint(path)
    entry = described(checkpoint, path)
    made = entry["plan"] if part == "tables" else entry["about"].get(f"{part}_plan")
    if made is None and part == "attention":
        raise UserError(f"{path}: its attention has no tables of its own; leave --part out to export those it shares")
    if made is None:
        raise UserError(f"{path}: its {part} were not made from a plan, so they cannot be rebuilt here")
    own = f"{part}."
    state = {key.removeprefix(own): value for key, value in checkpoint["state_dict"].items() if key.startswith(own)}
    try:
        plan = Plan.from_dict(made)
        _check_state(plan, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    is_sequence = any(feature.pooling == "none" for feature in plan.features)
    tables = (EmbeddingCollection if is_sequence else EmbeddingBagCollection)(plan, backend=backend, init_std=None)
    try:
        tables.load_state_dict(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not hold the tables of its plan: {' '.join(str(error).split())[:300]}") from None
    return tables


def _check_state(plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Holds a plan to the tensors that are there, before it takes memory."""
    for name, table in plan.tables.items():
        held = state.get(f"lookup.{name}")
        if held is None or held.shape != (table.num_rows, table.width):
            found = "none" if held is None else f"one of {list(held.shape)}"
            raise UserError(
                f"table {name!r} should be [{table.num_rows}, {table.width}] by the plan, and there is {found}"
            )
    check_arrays(plan.encodings, {name.removeprefix("arrays."): tensor for name, tensor in state.items()})
