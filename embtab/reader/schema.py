"""The files of a bundle: what config.json says is in them, checked, and their tensors left on disk until they are read.

NumPy and json only. What all folders of embtab have in common (digests, the list of files) is `embtab.reader.manifest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embtab.reader.manifest import CONFIG, MAX_JSON, BundleError, Config, is_int, need, parse_json, read_signed, refused

FORMAT, VERSION = "embtab-bundle", 1
DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
ROW_DTYPES = {"fp32": "F32", "fp16": "F16", "int8": "U8", "int4": "U8"}
ARRAY_DTYPES = {"float32": "F32", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
MAX_PARTS = 1024  # of a vector, beyond two for each of its numbers: what a lookup may be made to do
POOLINGS = ("sum", "mean", "none")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, its own digest and every entry checked.

    Raises:
        BundleError: when it is absent, altered, of another version, or says what cannot be.
    """
    config = read_signed(folder, FORMAT, VERSION, "a bundle")
    with refused(folder / CONFIG):
        _check_config(config)
    return config


def _check_config(config: Config) -> None:
    plan = config["plan"]
    need(is_int(plan["dim"], 1, 2**20), f"dim {plan['dim']!r} cannot be")
    need(isinstance(plan["seed"], int), f"seed {plan['seed']!r} cannot be")
    tables = plan["tables"]
    need(isinstance(tables, list), "tables must be a list")
    for table in tables:
        need(isinstance(table["name"], str), f"table name {table['name']!r} is no string")
        need(table["precision"] in ROW_DTYPES, f"table {table['name']!r}: precision {table['precision']!r}")
        shape = (table["num_rows"], table["width"])
        need(is_int(shape[0], 0, 2**63) and is_int(shape[1], 1, 2**31), f"table {table['name']!r}: shape {shape!r}")
    names = {table["name"] for table in tables}
    need(len(names) == len(tables), "two tables have one name")
    encodings = plan["encodings"]
    for space, encoding in encodings.items():
        need(isinstance(encoding["method"], str), f"encoding {space!r}: method {encoding['method']!r}")
        need(encoding["dim"] == plan["dim"], f"encoding {space!r}: dim {encoding['dim']!r}, not {plan['dim']}")
        bound = encoding["num_ids"]
        need(bound is None or is_int(bound, 1, 2**63), f"encoding {space!r}: num_ids {bound!r}")
        need(isinstance(encoding["tables"], list), f"encoding {space!r}: tables must be a list")
        parts = len(encoding["tables"])
        need(parts <= 2 * plan["dim"] + MAX_PARTS, f"encoding {space!r}: {parts} parts of a vector")
        for name in encoding["tables"]:
            need(name in names, f"encoding {space!r} reads a table {name!r} that is not there")
    _check_features(plan["features"], encodings)
    need(config["golden"]["file"] in config["files"], "golden names a file that is not listed")
    for key in ("absolute", "relative"):
        value = config["golden"][key]
        need(isinstance(value, float) and 0 <= value < math.inf, f"golden: {key} {value!r}")
    need(config["tensors"] == _described(config), "tensors do not agree with tables and arrays")


def _check_features(features: Any, encodings: Config) -> None:
    need(isinstance(features, list) and features, "features must be a list of at least one")
    seen: set[str] = set()
    for feature in features:
        name, space = feature["name"], feature["id_space"]
        need(isinstance(name, str) and name and name not in seen, f"feature name {name!r} is empty or stands twice")
        seen.add(name)
        need(space is None or isinstance(space, str), f"feature {name!r}: id_space {space!r}")
        need((space or name) in encodings, f"feature {name!r} has no encoding")
        bound = encodings[space or name]["num_ids"]
        need(is_int(feature["num_ids"], 1, 2**63), f"feature {name!r}: num_ids {feature['num_ids']!r}")
        need(bound in (None, feature["num_ids"]), f"feature {name!r}: num_ids is not its encoding's")
        hashed = feature.get("hashed", False)
        need(isinstance(hashed, bool) and not (hashed and bound), f"feature {name!r}: hashed {hashed!r}")
        need(feature["pooling"] in POOLINGS, f"feature {name!r}: pooling {feature['pooling']!r}")


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
        need(array["dtype"] in ARRAY_DTYPES, f"array {array['name']!r}: dtype {array['dtype']!r}")
        specs[f"arrays.{array['space']}.{array['name']}"] = (ARRAY_DTYPES[array["dtype"]], array["shape"])
    return specs


def _described(config: Config) -> dict[str, Any]:
    """What "tensors" must say: the implied specs, in the files it names itself."""
    described = {}
    for name, (dtype, shape) in tensor_specs(config["plan"], config["arrays"]).items():
        need(name in config["tensors"], f"no tensor {name!r}")
        file = config["tensors"][name]["file"]
        need(file in config["files"], f"tensor {name!r} is in a file {file!r} that is not listed")
        described[name] = {"file": file, "dtype": dtype, "shape": shape}
    return described


def map_tensors(path: Path, writable: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: nothing but the header is read.

    Args:
        path: the file.
        writable: whether tensors may be written to, which changes memory and never the file.

    Raises:
        BundleError: when the header is damaged, or claims what the file does not hold.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise BundleError(f"{path}: damaged (its header is longer than the file)")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    content = np.asarray(np.memmap(path, np.uint8, "c" if writable else "r")) if size else np.empty(0, np.uint8)
    tensors, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            shape, dtype = entry["shape"], np.dtype(DTYPES[entry["dtype"]])
            whole = all(is_int(n, 0, 2**63) for n in (*shape, first, last))
            if not whole or first != end or last - first != math.prod(shape) * dtype.itemsize or start + last > size:
                raise BundleError(f"{path}: damaged (tensor {name!r} does not lie where it should)")
            tensors[name] = content[start + first : start + last].view(dtype).reshape(shape)
            end = last
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BundleError(f"{path}: damaged (its header is not that of a safetensors file)") from None
    if start + end != size:
        raise BundleError(f"{path}: damaged ({size - start - end} bytes belong to no tensor)")
    return tensors


def open_tensors(folder: Path, described: Config, writable: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of "tensors", mapped; exactly these, of these types and shapes.

    Raises:
        BundleError: when a file holds anything else.
    """
    found: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(entry["file"] for entry in described.values()):
        held = map_tensors(folder / file, writable)
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
