"""Deltas: what changed between a bundle and the tables of a later training, as rows to put in their places.

    config.json          the base's digest, the names of what changed, sha256 of every file, a digest of its own
    changes.safetensors  at.T int64 [C]: the changed rows of tensor T, rising; new.T [C, ...]: what stands there now
    golden.safetensors   the golden vectors from now on

A delta belongs to one bundle, or to one delta on top of it: each names the config.json digest of what it is made for,
so a chain that is out of order, or lacks a link, is refused. NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embtab.reader.manifest import CONFIG, BundleError, check_files, is_int, need, read_signed, refused
from embtab.reader.schema import check_finite, map_tensors

FORMAT, VERSION = "embtab-delta", 1
CHANGES = "changes.safetensors"

Tensors = dict[str, np.ndarray]


class Delta:
    """A delta folder, opened and checked.

    Args:
        path: the folder that `embtab export --since` wrote.
        verify: compare its files with their sha256, and look for NaN.

    Raises:
        BundleError: when it is damaged, or no delta.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        self.config = read_signed(self.path, FORMAT, VERSION, "a delta")
        check_files(self.path, self.config, verify)
        golden = self.config.get("golden", {})
        with refused(self.path / CONFIG):
            need(isinstance(self.config["base"], str), "base must be a digest")
            need(CHANGES in self.config["files"], f"{CHANGES} is not listed")
            need(golden["file"] in self.config["files"], "golden names a file that is not listed")
            for key in ("absolute", "relative"):
                need(isinstance(golden[key], float) and 0 <= golden[key] < np.inf, f"golden: {key} {golden[key]!r}")
            for name, count in self.config["changed"].items():
                need(is_int(count, 1, 2**63), f"tensor {name!r}: {count!r} changed rows")
        self.changes = map_tensors(self.path / CHANGES)
        if verify:
            check_finite(self.changes, self.path)

    def apply(self, tensors: Tensors, base: str) -> None:
        """Writes the changed rows into tensors that stand for the base.

        Args:
            tensors: of the base, mapped so that writing changes memory only.
            base: the digest of what they came from.

        Raises:
            BundleError: when the delta is for another base, or its rows do not fit.
        """
        if self.config["base"] != base:
            raise BundleError(
                f"{self.path}: made for {self.config['base'][:12]}..., not for {base[:12]}...; give the bundle it was "
                "made for, and every delta since in order"
            )
        changed = self.config["changed"]
        if set(self.changes) != {f"{part}.{name}" for name in changed for part in ("at", "new")}:
            raise BundleError(f"{self.path / CHANGES}: does not hold what {CONFIG} says")
        for name, count in changed.items():
            at, new, old = self.changes[f"at.{name}"], self.changes[f"new.{name}"], tensors.get(name)
            if old is None or new.dtype != old.dtype or new.shape != (count, *old.shape[1:]):
                raise BundleError(f"{self.path}: tensor {name!r} is not one of the base's")
            if (
                at.dtype != np.int64
                or at.shape != (count,)
                or at[0] < 0
                or at[-1] >= len(old)
                or (np.diff(at) <= 0).any()
            ):
                raise BundleError(f"{self.path}: tensor {name!r}: rows that the base does not have")
        for name in changed:
            tensors[name][self.changes[f"at.{name}"]] = self.changes[f"new.{name}"]


def applied(tensors: Tensors, base: str, deltas: Sequence[str | Path], verify: bool) -> tuple[list[Delta], str]:
    """Applies deltas in order to the tensors of a bundle; gives them, and the digest of what came out.

    Raises:
        BundleError: at the first that is damaged or does not follow; tensors are then of no use.
    """
    opened = []
    for path in deltas:
        delta = Delta(path, verify)
        delta.apply(tensors, base)
        base = delta.config["sha256"]
        opened.append(delta)
    return opened, base


def changes(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> tuple[Tensors, dict[str, int]]:
    """The content of CHANGES, and how many rows of each tensor changed, bit for bit.

    Raises:
        ValueError: when a tensor is not there in both, or has another type or shape: no delta can say that.
    """
    content: Tensors = {}
    counts: dict[str, int] = {}
    for name in old.keys() | new.keys():
        if (
            name not in old
            or name not in new
            or old[name].shape != new[name].shape
            or old[name].dtype != new[name].dtype
        ):
            raise ValueError(f"tensor {name!r} is not the same in both")
        rows = _changed_rows(old[name], new[name])
        if len(rows):
            content |= {f"at.{name}": rows, f"new.{name}": np.ascontiguousarray(new[name][rows])}
            counts[name] = len(rows)
    return content, dict(sorted(counts.items()))


def _changed_rows(old: np.ndarray, new: np.ndarray, block: int = 2**16) -> np.ndarray:
    found = [np.empty(0, np.int64)]
    for first in range(0, len(old), block):
        a, b = (np.ascontiguousarray(each[first : first + block]) for each in (old, new))
        different = (a.view(np.uint8) != b.view(np.uint8)).reshape(len(a), -1).any(1)
        found.append(first + np.flatnonzero(different))
    return np.concatenate(found)


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two bundles must have in common for one to be a delta of the other."""
    tensors = {name: {key: entry[key] for key in ("dtype", "shape")} for name, entry in config["tensors"].items()}
    return {"plan": {key: value for key, value in config["plan"].items() if key != "budget"}, "tensors": tensors}
