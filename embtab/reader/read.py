"""Reads tables with NumPy alone: the oracle of the tests, and the template for a port to another language.

Given a plan as plain data (`Plan.to_dict`) and the physical tables as arrays, `vectors` gives the vector of each id and
`lookup` pools them over bags; a `Bundle` does both from a folder. The methods are in `embtab.reader.decoders`.

    N ids   B bags   D dimension   R rows of a physical table   W its width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embtab.reader.decoders import DECODERS, Tables
from embtab.reader.delta import applied
from embtab.reader.manifest import BundleError, check_files
from embtab.reader.packed_rows import Rows
from embtab.reader.schema import check_finite, map_tensors, open_tensors, read_config

VOCABULARY = "vocabulary.safetensors"


def vectors(plan: Mapping[str, Any], tables: Tables, feature: str, ids: np.ndarray) -> np.ndarray:
    """float32 [N, D]: the vector of each id of a feature.

    Args:
        plan: what `Plan.to_dict` gives.
        tables: the physical tables [R, W] by name, and the encodings' arrays as "space.array".
        feature: a feature of the plan.
        ids: int64 [N].

    Raises:
        KeyError: for a feature the plan does not have.
        IndexError: for an id outside [0, num_ids) where the method does not take any int64.
    """
    space = _feature(plan, feature)["id_space"] or feature
    encoding = plan["encodings"][space]
    _refuse_outside(encoding["num_ids"], feature, ids)
    return _decoded(encoding, tables, space, ids)


def lookup(
    plan: Mapping[str, Any],
    tables: Tables,
    feature: str,
    ids: np.ndarray,
    offsets: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [B, D]: the pooled vectors of bags, by the feature's own pooling; an empty bag gives zeros.

    Args:
        plan: what `Plan.to_dict` gives.
        tables: the physical tables [R, W] by name, and the encodings' arrays as "space.array".
        feature: a feature of the plan.
        ids: int64 [N].
        offsets: int64 [B + 1]; bag b holds ids[offsets[b]:offsets[b + 1]].
        weights: float32 [N], factors of the vectors; a mean still divides by the number of ids.

    Raises:
        ValueError: for offsets or weights that do not fit the ids.
        As `vectors` otherwise.
    """
    each, offsets = vectors(plan, tables, feature, ids), _integers(offsets, "offsets")
    _refuse_misfits(len(each), offsets, weights)
    return pool(each, offsets, _feature(plan, feature)["pooling"], weights)


def pool(each: np.ndarray, offsets: np.ndarray, pooling: str, weights: np.ndarray | None = None) -> np.ndarray:
    """float32 [B, D]: sums (or means) over bags of vectors [N, D] times their weights [N]; see `lookup`."""
    if weights is not None:
        each = each * weights[:, None]
    lengths = np.diff(offsets)
    pooled = np.zeros((len(lengths), each.shape[1]), dtype=each.dtype)
    np.add.at(pooled, np.repeat(np.arange(len(lengths)), lengths), each)
    if pooling == "mean":
        pooled /= np.maximum(lengths, 1)[:, None].astype(each.dtype)
    return pooled


def _decoded(encoding: Mapping[str, Any], tables: Tables, space: str, ids: np.ndarray) -> np.ndarray:
    return DECODERS[encoding["method"]](encoding, tables, _Arrays(tables, f"{space}."), ids)


class _Arrays(Mapping[str, Any]):
    """The arrays of one id space by their own names, of which only those that are asked for are looked up."""

    def __init__(self, tables: Tables, prefix: str) -> None:
        self.tables, self.prefix = tables, prefix

    def __getitem__(self, name: str) -> Any:
        return self.tables[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tables if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _feature(plan: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for entry in plan["features"]:
        if entry["name"] == name:
            return entry
    raise KeyError(f"no feature {name!r}; there are {', '.join(entry['name'] for entry in plan['features'])}")


def _refuse_outside(bound: int | None, feature: str, ids: np.ndarray) -> None:
    outside = np.zeros(0, bool) if bound is None else (ids < 0) | (ids >= bound)
    if outside.any():
        raise IndexError(f"feature {feature!r}: id {ids[outside][0]} is outside [0, {bound})")


class Bundle:
    """A bundle folder, opened: tables stay on disk, and only the rows that a lookup asks for are read and decoded.

    Args:
        path: the folder that `embtab.save` or `embtab export` wrote.
        verify: read everything once to compare it with its sha256 and to find NaN, which takes about a second per
            gigabyte; without it only names, sizes and headers are checked.
        deltas: folders that `embtab export --since` wrote, in order. Their rows take the place of the bundle's, in
            memory: about what they changed.

    Raises:
        BundleError: when a file is missing, altered, or not what config.json says, or a delta is for another bundle.
    """

    def __init__(self, path: str | Path, verify: bool = True, deltas: Sequence[str | Path] = ()) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        check_files(self.path, self.config, verify)
        tensors = open_tensors(self.path, self.config["tensors"], writable=bool(deltas))
        if verify:
            check_finite(tensors, self.path)
        self.deltas, self.digest = applied(tensors, self.config["sha256"], deltas, verify)
        self.tensors: Tables = tensors
        self._holds(self.config["plan"], physical(self.config["plan"], tensors))

    @classmethod
    def of(cls, path: Path, plan: Mapping[str, Any], tables: Mapping[str, Any]) -> Bundle:
        """A bundle that is being written: what `lookup` needs, without config.json."""
        made = cls.__new__(cls)
        made.path, made.config, made.deltas = path, {"files": {}}, []
        made._holds(plan, tables)
        return made

    def _holds(self, plan: Mapping[str, Any], tables: Mapping[str, Any]) -> None:
        self.plan, self.tables = plan, tables
        self._entries = {entry["name"]: entry for entry in plan["features"]}
        self.features = list(self._entries)
        self._vocabularies: dict[str, dict[str, int]] = {}

    def _entry(self, feature: str) -> Mapping[str, Any]:
        return self._entries.get(feature) or _feature(self.plan, feature)  # which says what there is

    def vectors(self, feature: str, ids: np.ndarray) -> np.ndarray:
        """float32 [N, D]: the vector of each id.

        Args:
            feature: its name.
            ids: integers [N]; uint64 is read as the int64 of the same 64 bits.

        Raises:
            KeyError: for an unknown feature.
            IndexError: for an id outside [0, num_ids) where the method does not take any int64.
            BundleError: when the description cannot be decoded.
        """
        ids = _integers(ids, "ids")
        space = self._entry(feature)["id_space"] or feature
        encoding = self.plan["encodings"][space]
        _refuse_outside(encoding["num_ids"], feature, ids)
        if encoding["method"] not in DECODERS:
            raise BundleError(f"{self.path}: feature {feature!r}: no decoder for method {encoding['method']!r:.60}")
        try:
            with np.errstate(divide="raise"):
                found = np.asarray(_decoded(encoding, self.tables, space, ids), np.float32)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise BundleError(f"{self.path}: feature {feature!r} cannot be decoded: {error!r}") from None
        if found.shape != (len(ids), self.plan["dim"]):
            raise BundleError(
                f"{self.path}: feature {feature!r} gives {found.shape[1:]}, not {self.plan['dim']} numbers"
            )
        return found

    def lookup(
        self, feature: str, ids: np.ndarray, offsets: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [B, D]: the pooled vectors of bags, as `reader.lookup`; each id is a bag where `offsets` is None.

        Args:
            feature: its name.
            ids: integers [N].
            offsets: integers [B + 1] from 0 to N; bag b holds ids[offsets[b]:offsets[b + 1]].
            weights: float [N], factors of the vectors.

        Raises:
            ValueError: for offsets or weights that do not fit the ids, or bags of a feature that is not pooled.
            As `vectors` otherwise.
        """
        each = self.vectors(feature, ids)
        offsets = np.arange(len(each) + 1) if offsets is None else _integers(offsets, "offsets")
        _refuse_misfits(len(each), offsets, weights)
        pooling = self._entry(feature)["pooling"]
        if pooling == "none" and (np.diff(offsets) != 1).any():
            raise ValueError(f"feature {feature!r} is not pooled; use vectors")
        return pool(each, offsets, pooling, None if weights is None else np.asarray(weights, np.float32))

    def raw_ids(self, feature: str, values: Sequence[str]) -> np.ndarray:
        """int64 [N]: the ids of raw values, by the vocabulary inside the bundle; 0 for values it does not hold.

        Raises:
            KeyError: when the bundle has no vocabulary of this feature.
        """
        if feature not in self._vocabularies:  # kept here and not by a decorator, which would keep the bundle too
            self._vocabularies[feature] = self._vocabulary(feature)
        known = self._vocabularies[feature]
        return np.array([known.get(value, 0) for value in values], dtype=np.int64)

    def _vocabulary(self, feature: str) -> dict[str, int]:
        held = map_tensors(self.path / VOCABULARY) if VOCABULARY in self.config["files"] else {}
        if f"ends.{feature}" not in held:
            raise KeyError(f"{self.path}: no vocabulary of feature {feature!r}")
        text, ends = held[f"bytes.{feature}"].tobytes(), held[f"ends.{feature}"].tolist()
        values = [text[first:last].decode("utf-8") for first, last in pairwise([0, *ends])]
        # Id 0 stands for all other values and has no raw value of its own: it is empty unless it says otherwise.
        return {value: i for i, value in enumerate(values) if i or value}


def physical(plan: Mapping[str, Any], tensors: Tables) -> dict[str, Any]:
    """Tables by name, decoded as they are read, and arrays as "space.array", from the tensors of a bundle."""
    tables: dict[str, Any] = {
        name.removeprefix("arrays."): tensor for name, tensor in tensors.items() if name.startswith("arrays.")
    }
    for table in plan["tables"]:
        name = table["name"]
        if name in tables:
            raise BundleError(f"table {name!r} has the name of an array; rename the feature")
        stored = tensors[f"rows.{name}"]
        packed = Rows(stored, table["width"], tensors.get(f"scales.{name}"), tensors.get(f"offsets.{name}"))
        tables[name] = stored if table["precision"] == "fp32" else packed
    return tables


def _integers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{what} must be one row of integers; got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _refuse_misfits(ids: int, offsets: np.ndarray, weights: np.ndarray | None) -> None:
    """Raises ValueError for offsets or weights that are not those of so many ids."""
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != ids or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets must rise from 0 to the {ids} ids")
    if weights is not None and np.shape(weights) != (ids,):
        raise ValueError(f"weights must have shape ({ids},), one per id; got {np.shape(weights)}")
