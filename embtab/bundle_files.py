"""The files of a bundle: what config.json says is in them, checked, and their tensors left on disk until they are read.

NumPy and json only. Every check says in one line what is wrong, and nothing that a file claims is believed before it
was compared with the file's size: a bundle may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embtab.errors import UserError

FORMAT, VERSION = "embtab-bundle", 1
CONFIG = "config.json"
DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
ROW_DTYPES = {"fp32": "F32", "fp16": "F16", "int8": "U8", "int4": "U8"}
ARRAY_DTYPES = {"float32": "F32", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
POOLINGS = ("sum", "mean", "none")

_MAX_JSON = 100_000_000  # bytes; safetensors' own limit for its header
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Config = Mapping[str, Any]


class BundleError(UserError):
    """A bundle is damaged, incomplete or not a bundle; the message names folder, file and what is wrong."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, its own digest and every entry checked.

    Raises:
        BundleError: when it is absent, altered, of another version, or says what cannot be.
    """
    path = folder / CONFIG
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder}: not a bundle (no {CONFIG})")
    if path.stat().st_size > _MAX_JSON:
        raise BundleError(f"{path}: larger than {_MAX_JSON} bytes")
    text = path.read_bytes()
    config = parse_json(text, path)
    if config.get("format") != FORMAT:
        raise BundleError(f"{path}: not the description of an embtab bundle")
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise BundleError(f"{path}: version {config.get('version')!r}; this embtab reads version {VERSION}")
    if config.get("sha256") != config_digest(text, config.get("sha256")):
        raise BundleError(f"{path}: altered since it was written (its sha256 does not match)")
    try:
        _check_config(config)
    except (_WrongError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: {what}") from None
    return config


def config_digest(text: bytes, written: Any) -> str:
    """The sha256 of config.json's bytes, its own 64 hexadecimal digits replaced by zeros."""
    if not isinstance(written, str) or not _DIGEST.fullmatch(written) or text.count(written.encode()) != 1:
        return "none"
    return hashlib.sha256(text.replace(written.encode(), b"0" * 64)).hexdigest()


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The object in `text`; no key twice, no NaN.

    Raises:
        BundleError: when it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BundleError(f"{path}: damaged JSON: not an object")
    return parsed


class _WrongError(Exception):
    """An entry of config.json that cannot be."""


def _need(condition: Any, what: str) -> None:
    if not condition:
        raise _WrongError(what)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _check_config(config: Config) -> None:
    plan = config["plan"]
    _need(_is_int(plan["dim"], 1, 2**20), f"dim {plan['dim']!r} cannot be")
    tables = plan["tables"]
    _need(isinstance(tables, list), "tables must be a list")
    for table in tables:
        _need(isinstance(table["name"], str), f"table name {table['name']!r} is no string")
        _need(table["precision"] in ROW_DTYPES, f"table {table['name']!r}: precision {table['precision']!r}")
        shape = (table["num_rows"], table["width"])
        _need(_is_int(shape[0], 0, 2**31) and _is_int(shape[1], 1, 2**31), f"table {table['name']!r}: shape {shape!r}")
    names = {table["name"] for table in tables}
    _need(len(names) == len(tables), "two tables have one name")
    encodings = plan["encodings"]
    for space, encoding in encodings.items():
        _need(isinstance(encoding["method"], str), f"encoding {space!r}: method {encoding['method']!r}")
        _need(encoding["dim"] == plan["dim"], f"encoding {space!r}: dim {encoding['dim']!r}, not {plan['dim']}")
        bound = encoding["num_ids"]
        _need(bound is None or _is_int(bound, 1, 2**63), f"encoding {space!r}: num_ids {bound!r}")
        for name in encoding["tables"]:
            _need(name in names, f"encoding {space!r} reads a table {name!r} that is not there")
    _check_features(plan["features"], encodings)
    for name, entry in config["files"].items():
        _need(_FILE_NAME.fullmatch(name) and name != CONFIG, f"file name {name!r} is not allowed")
        _need(_is_int(entry["bytes"], 0, 2**63), f"file {name!r}: bytes {entry['bytes']!r}")
        _need(isinstance(entry["sha256"], str) and _DIGEST.fullmatch(entry["sha256"]), f"file {name!r}: no sha256")
    _need(config["golden"]["file"] in config["files"], "golden names a file that is not listed")
    for key in ("absolute", "relative"):
        value = config["golden"][key]
        _need(isinstance(value, float) and 0 <= value < math.inf, f"golden: {key} {value!r}")
    _need(config["tensors"] == _described(config), "tensors do not agree with tables and arrays")


def _check_features(features: Any, encodings: Config) -> None:
    _need(isinstance(features, list) and features, "features must be a list of at least one")
    seen: set[str] = set()
    for feature in features:
        name, space = feature["name"], feature["id_space"]
        _need(isinstance(name, str) and name and name not in seen, f"feature name {name!r} is empty or stands twice")
        seen.add(name)
        _need(space is None or isinstance(space, str), f"feature {name!r}: id_space {space!r}")
        _need((space or name) in encodings, f"feature {name!r} has no encoding")
        bound = encodings[space or name]["num_ids"]
        _need(_is_int(feature["num_ids"], 1, 2**63), f"feature {name!r}: num_ids {feature['num_ids']!r}")
        _need(bound in (None, feature["num_ids"]), f"feature {name!r}: num_ids is not its encoding's")
        _need(feature["pooling"] in POOLINGS, f"feature {name!r}: pooling {feature['pooling']!r}")


def tensor_specs(plan: Config, arrays: Sequence[Config]) -> dict[str, tuple[str, list[int]]]:
    """Type (as safetensors writes it) and shape of every tensor, by name, as tables and arrays imply them."""
    specs: dict[str, tuple[str, list[int]]] = {}
    for table in plan["tables"]:
        name, rows, width, precision = (table[key] for key in ("name", "num_rows", "width", "precision"))
        stored = -(-width // 2) if precision == "int4" else width
        specs[f"rows.{name}"] = (ROW_DTYPES[precision], [rows, stored])
        if precision in ("int8", "int4"):
            specs[f"scales.{name}"] = specs[f"offsets.{name}"] = ("F16", [rows])
    for array in arrays:
        _need(array["dtype"] in ARRAY_DTYPES, f"array {array['name']!r}: dtype {array['dtype']!r}")
        specs[f"arrays.{array['space']}.{array['name']}"] = (ARRAY_DTYPES[array["dtype"]], array["shape"])
    return specs


def _described(config: Config) -> dict[str, Any]:
    """What "tensors" must say: the implied specs, in the files it names itself."""
    described = {}
    for name, (dtype, shape) in tensor_specs(config["plan"], config["arrays"]).items():
        _need(name in config["tensors"], f"no tensor {name!r}")
        file = config["tensors"][name]["file"]
        _need(file in config["files"], f"tensor {name!r} is in a file {file!r} that is not listed")
        described[name] = {"file": file, "dtype": dtype, "shape": shape}
    return described


def check_files(folder: Path, config: Config, verify: bool) -> None:
    """The folder holds the listed files and no other, each of its size and, where `verify`, of its sha256.

    Raises:
        BundleError: when it does not.
    """
    listed = config["files"]
    for entry in sorted(folder.iterdir()):
        if entry.name != CONFIG and entry.name not in listed:
            raise BundleError(f"{entry}: not part of the bundle; remove it")
    for name, about in listed.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise BundleError(f"{path}: missing; copy the whole bundle again")
        size = path.stat().st_size
        if size != about["bytes"]:
            raise BundleError(f"{path}: {size} bytes where {about['bytes']} were written; copy the whole bundle again")
        if verify and file_digest(path) != about["sha256"]:
            raise BundleError(f"{path}: damaged (its sha256 does not match); copy the whole bundle again")


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped read-only: nothing but the header is read.

    Raises:
        BundleError: when the header is damaged, or claims what the file does not hold.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_JSON):
            raise BundleError(f"{path}: damaged (its header is longer than the file)")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    content = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    tensors, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            shape, dtype = entry["shape"], np.dtype(DTYPES[entry["dtype"]])
            whole = all(_is_int(n, 0, 2**63) for n in (*shape, first, last))
            if not whole or first != end or last - first != math.prod(shape) * dtype.itemsize or start + last > size:
                raise BundleError(f"{path}: damaged (tensor {name!r} does not lie where it should)")
            tensors[name] = content[start + first : start + last].view(dtype).reshape(shape)
            end = last
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BundleError(f"{path}: damaged (its header is not that of a safetensors file)") from None
    if start + end != size:
        raise BundleError(f"{path}: damaged ({size - start - end} bytes belong to no tensor)")
    return tensors


def open_tensors(folder: Path, described: Config) -> dict[str, np.ndarray]:
    """Every tensor of "tensors", mapped; exactly these, of these types and shapes.

    Raises:
        BundleError: when a file holds anything else.
    """
    found: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(entry["file"] for entry in described.values()):
        held = map_tensors(folder / file)
        for name, tensor in held.items():
            entry = described.get(name)
            if entry is None or entry["file"] != file:
                raise BundleError(f"{folder / file}: tensor {name!r} should not be here")
            if tensor.dtype != DTYPES[entry["dtype"]] or list(tensor.shape) != entry["shape"]:
                raise BundleError(f"{folder / file}: tensor {name!r} is not {entry['dtype']} {entry['shape']}")
        found |= held
    for name, entry in described.items():
        if name not in found:
            raise BundleError(f"{folder / entry['file']}: tensor {name!r} is missing")
    return found


def check_finite(tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """No NaN and no infinity in any tensor.

    Raises:
        BundleError: naming tensor and row.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "f" or not tensor.size:
            continue
        step = max(2**22 * len(tensor) // tensor.size, 1)
        for first in range(0, len(tensor), step):
            finite = np.isfinite(tensor[first : first + step]).reshape(len(tensor[first : first + step]), -1).all(1)
            if not finite.all():
                raise BundleError(f"{folder}: {name} holds NaN or infinity in row {first + int(finite.argmin())}")
