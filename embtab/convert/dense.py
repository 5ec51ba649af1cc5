"""Dense tables from anywhere, into any plan: read safely, fit, and say how much was lost.

Files stay on disk: safetensors (of types that NumPy has) and npy are memory-mapped, Parquet is copied a few thousand
rows at a time to a mapped file without a name, and fits read a chunk of ids at a time, so a table may be larger than
memory where its fit is one of closed form. Torch files are mapped where they are in the zip
format, as they are since torch 1.6.
"""

from __future__ import annotations

import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtab.convert.fit import CHUNK, Target, fit
from embtab.errors import DataError, UserError
from embtab.features import Feature, id_spaces, read_features
from embtab.planning import Plan
from embtab.reader import BundleError
from embtab.reader.schema import map_tensors
from embtab.tables import EmbeddingBagCollection
from embtab.tables.base import Collection

PARQUET_ROWS = 8192  # read at a time
TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin", ".model")
Dense = Mapping[str, Tensor | np.ndarray]


class Names(NamedTuple):
    """How a library calls its tables: a regular expression whose first group is the feature, and what is too narrow."""

    pattern: str
    least_width: int = 1


NAMES = {
    "embtab": Names(r"^tables\.lookup\.(.+)$"),
    "torchrec": Names(r"(?:^|\.)embedding(?:_bag)?s\.([^.]+)\.weight$"),
    # Numeric values have a matrix of one column beside the tables: the weight of a Linear(1, D).
    "fuxictr": Names(r"^embedding_layer\.(?:embedding_layer\.)?embedding_layers?\.(.+)\.weight$", 2),
}


def from_dense(weights: Dense, plan: Plan, backend: str = "torch") -> EmbeddingBagCollection:
    """Tables whose vectors come as close to dense ones as the plan allows, weighted by the features' counts.

    An id that the counts have never seen weighs as much as one seen once; without counts all weigh the same.

    Args:
        weights: float [num_ids, D] for every id space, by the name of the space or of one of its features.
        plan: what the tables should take; exact where it is dense, else see `embtab.convert.fit`.
        backend: of the result: "torch", "fbgemm" or "native".

    Raises:
        UserError: when a table is missing, unknown, of another shape than the plan, or not finite.
    """
    dense = _by_space(weights, plan)
    made = EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    counts = {space.name: space.counts for space in id_spaces(plan.features)}
    targets = [_target(made, space, table, counts[space]) for space, table in dense.items()]
    fit(targets, {name: made.lookup.table(name) for name in plan.tables}, plan.seed)
    if backend == "torch":
        return made
    other = EmbeddingBagCollection(plan, backend=backend, init_std=None)
    other.load_state_dict(made.state_dict())
    return other


def _target(tables: Collection, space: str, dense: Tensor, counts: np.ndarray | None) -> Target:
    encoding = tables.plan.encodings[space]
    widths = tuple(tables.plan.tables[name].width for name in encoding.tables)
    return Target(encoding, dense, _weights_of(counts, len(dense)), tables.arrays.of(space), widths)


def _weights_of(counts: np.ndarray | None, num_ids: int) -> Tensor:
    """float32 [num_ids], of mean 1."""
    if counts is None:
        return torch.ones(num_ids)
    seen = torch.from_numpy(np.maximum(counts, 1)).double()
    return (seen / seen.mean()).float()


def _by_space(weights: Dense, plan: Plan) -> dict[str, Tensor]:
    """The dense table of every id space, float32 and checked."""
    space_of = {feature.name: feature.space for feature in plan.features} | {space: space for space in plan.encodings}
    num_ids = {feature.space: feature.num_ids for feature in plan.features}
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in space_of:
            raise UserError(f"dense table {name!r} is of no feature of the plan; it has {', '.join(num_ids)}")
        space = space_of[name]
        if any(feature.hashed for feature in plan.features if feature.space == space):
            raise UserError(
                f"dense table {name!r}: the ids of its feature are any 64-bit numbers (hashed), so no row is theirs"
            )
        if space in found and isinstance(weight, Tensor) and weight.data_ptr() == found[space].data_ptr():
            continue  # one table under the names of two features that share it
        if space in found:
            raise UserError(f"dense table {name!r}: id space {space!r} has a table already; give one per id space")
        table = torch.as_tensor(weight).detach().cpu().float()
        if tuple(table.shape) != (num_ids[space], plan.dim):
            raise UserError(
                f"dense table {name!r} is {tuple(table.shape)}; the plan wants {(num_ids[space], plan.dim)}"
            )
        for first in range(0, len(table), CHUNK):
            bad = ~table[first : first + CHUNK].isfinite().all(1)
            if bool(bad.any()):
                raise UserError(f"dense table {name!r}: row {first + int(bad.nonzero()[0])} holds NaN or infinity")
        found[space] = table
    for space in plan.encodings:
        if space not in found:
            raise UserError(f"no dense table for {space!r}; there are {', '.join(weights) or 'none'}")
    return found


@torch.no_grad()
def reconstruction_errors(
    tables: Collection, weights: Dense, counts: Mapping[str, np.ndarray | None]
) -> dict[str, float]:
    """By id space, the root of the weighted mean square of what is lost, relative to that of the dense vectors.

    Args:
        tables: what `from_dense` made, or the same from a bundle.
        weights: the dense tables.
        counts: int64 [num_ids] by id space, where known.
    """
    errors = {}
    for space, dense in _by_space(weights, tables.plan).items():
        target = _target(tables, space, dense, counts.get(space))
        weight = target.weights.double()
        rows = {name: tables.lookup.table(name) for name in target.encoding.tables}
        lost = whole = 0.0
        for ids in target.chunks():
            lost += float((weight[ids] * (target.compose(ids, rows) - dense[ids]).double().square().sum(1)).sum())
            whole += float((weight[ids] * dense[ids].double().square().sum(1)).sum())
        errors[space] = (lost / max(whole, 1e-300)) ** 0.5
    return errors


def features_of(weights: Dense, data: Path | None) -> list[Feature]:
    """The features of dense tables: those of a dataset folder that have one; without a folder one per table, summed.

    Raises:
        UserError: when the folder has none of them.
    """
    if data is None:
        return [Feature(name, len(weight)) for name, weight in weights.items()]
    features = [f for f in read_features(data) if f.name in weights or f.space in weights]
    if not features:
        raise UserError(f"{data}: has no feature called {', '.join(weights)}; choose names by --pattern")
    return features


def read_dense(paths: Sequence[Path], pattern: str | None = None) -> dict[str, Tensor]:
    """Dense tables float32 [num_ids, D] by feature, from files; nothing in them is executed.

    Args:
        paths: .safetensors; .npy or .parquet (int64 `id`, list of floats `vector`), named after their feature; torch
            files (TORCH_FILES) that hold a state dict, such as torchrec's or FuxiCTR's; or folders of them.
        pattern: a regular expression that the names of tables are searched for; the first group is the feature. Other
            tensors are left out. Or a name in NAMES, for what a library writes. Without it every matrix is a table,
            called as it is called in the file.

    Raises:
        DataError: when a file cannot be read, or holds no table.
        UserError: when the pattern is none, or two tables are of one feature.
    """
    names = NAMES.get(pattern or "", Names(pattern or "(?s)(.*)"))
    try:
        chosen = re.compile(names.pattern)
    except re.error as error:
        raise UserError(f"--pattern {pattern!r}: {error}") from None
    if chosen.groups < 1:
        raise UserError(
            f"--pattern {pattern!r}: needs a group for the feature, such as 'user_(.+)', or be {', '.join(NAMES)}"
        )
    tables: dict[str, Tensor] = {}
    for path in _expanded(paths):
        for name, tensor in _read(path):
            found = chosen.search(name)
            if found is None or tensor.dim() != 2 or not tensor.is_floating_point():
                continue
            if tensor.shape[1] < names.least_width:
                continue
            if found.group(1) in tables:
                raise UserError(f"{path}: feature {found.group(1)!r} has a table already; narrow --pattern")
            tables[found.group(1)] = tensor.float()
    if not tables:
        raise DataError(f"{paths[0]}: holds no matrix of floats" + (f" whose name fits {pattern!r}" if pattern else ""))
    widths = {name: tensor.shape[1] for name, tensor in tables.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"tables have different widths {widths}; choose those of one width by --pattern")
    return tables


def _expanded(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.iterdir()) if path.is_dir() else [path]


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = path.suffix.lower()
    try:
        if kind == ".safetensors":
            yield from _from_safetensors(path)
        elif kind == ".npy":
            yield path.stem, _mapped(np.load(path, mmap_mode="r", allow_pickle=False))
        elif kind == ".parquet":
            yield path.stem, _from_parquet(path)
        elif kind in TORCH_FILES:
            yield from _tensors(_load(path))
        else:
            raise DataError(f"{path}: unknown kind; give .safetensors, .npy, .parquet or {', '.join(TORCH_FILES)}")
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise DataError(f"{path}: holds more than tensors, which is not executed; save the state dict alone") from None
    except Exception as error:  # every library has errors of its own
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of the one inside a checkpoint."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict):
        yield from ((str(name), value) for name, value in state.items() if isinstance(value, Tensor))


def _load(path: Path) -> Any:
    """What a torch file holds: tensors and plain types, mapped where its format allows."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _mapped(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that may not be written to; nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def _from_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        for name, array in map_tensors(path).items():
            yield name, _mapped(array)
        return
    except BundleError:  # types that NumPy lacks, such as bfloat16: those are read into memory
        from safetensors.torch import load_file

    yield from load_file(path).items()


def _from_parquet(path: Path) -> Tensor:
    """float32 [n, D] from columns id and vector; ids are 0..n-1 in any order."""
    import pyarrow.parquet as pq

    # Read as it goes, not whole row groups ahead: those hold the whole table as often as not.
    file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    n, vectors, seen = file.metadata.num_rows, np.empty((0, 0), np.float32), np.zeros(file.metadata.num_rows, bool)
    for batch in file.iter_batches(PARQUET_ROWS, columns=["id", "vector"]):
        ids = batch["id"].to_numpy()
        flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
        if not vectors.size:
            width = len(flat) // max(len(ids), 1)
            with tempfile.TemporaryFile() as beside:  # it has no name, and vanishes with its mapping
                vectors = np.memmap(beside, np.float32, "w+", shape=(n, max(width, 1)))
        if len(flat) != len(ids) * vectors.shape[1]:
            raise DataError(f"{path}: column 'vector' needs lists of one length; fill missing vectors")
        if ids.min() < 0 or ids.max() >= n:
            raise DataError(f"{path}: column 'id' must hold 0..{n - 1}, each once; number the ids first")
        vectors[ids] = flat.reshape(len(ids), -1)
        seen[ids] = True
    if not n or not seen.all():
        raise DataError(f"{path}: column 'id' must hold 0..{n - 1}, each once; number the ids first")
    return torch.from_numpy(np.asarray(vectors))
