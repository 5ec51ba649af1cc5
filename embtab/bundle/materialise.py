"""Tables as plain vectors, a row per id: for rankers and stores that decode nothing.

    parquet     OUT/SPACE.parquet              id: int64, vector: fixed_size_list<float32>[D]
    hugectr     OUT/SPACE/key, emb_vector      int64 keys and float32 vectors, raw: a sparse model of HugeCTR (HPS)
    state_dict  OUT/tables.pt                  "SPACE.weight" [num_ids, D], what nn.Embedding and nn.EmbeddingBag load

Ids 0 to num_ids - 1 of each id space are written, in blocks, so memory stays flat (for a state dict it does not). What
a method gives beyond them, such as vectors for ids never seen, is lost: a bundle keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from embtab.errors import UserError
from embtab.files import new_folder
from embtab.reader import Bundle

BLOCK = 65_536


def materialise(bundle: Bundle, kind: str, out: str | Path) -> None:
    """Writes the vectors of every id of a bundle into a new folder.

    Args:
        bundle: an opened bundle.
        kind: "parquet", "hugectr" or "state_dict".
        out: the folder to make. Names of id spaces are percent-encoded where a file cannot be called so.

    Raises:
        UserError: for an unknown kind, or when `out` holds something.
    """
    if kind not in KINDS:
        raise UserError(f"unknown format {kind!r}; there are {', '.join(KINDS)}")
    with new_folder(Path(out)) as folder:
        KINDS[kind](bundle, folder)


def _spaces(bundle: Bundle) -> dict[str, tuple[str, int]]:
    """A feature and the number of ids of every id space."""
    found: dict[str, tuple[str, int]] = {}
    for entry in bundle.plan["features"]:
        if entry.get("hashed"):
            raise UserError(
                f"feature {entry['name']!r}: its ids are any 64-bit numbers (hashed), so its vectors cannot all be "
                "written; hand over the bundle itself, or export with --onnx"
            )
        found.setdefault(entry["id_space"] or entry["name"], (entry["name"], entry["num_ids"]))
    return found


def _blocks(bundle: Bundle, space: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 [n] and vectors float32 [n, D], block by block."""
    feature, num_ids = _spaces(bundle)[space]
    starts = range(0, num_ids, BLOCK)
    for first in tqdm(starts, desc=space, unit="block", leave=False, disable=len(starts) < 10):
        ids = np.arange(first, min(first + BLOCK, num_ids), dtype=np.int64)
        yield ids, bundle.vectors(feature, ids)


def _file_name(space: str) -> str:
    return quote(space, safe=" ").replace(".", "%2E")


def _parquet(bundle: Bundle, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = bundle.plan["dim"]
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])
    for space in _spaces(bundle):
        with pq.ParquetWriter(folder / f"{_file_name(space)}.parquet", schema) as writer:
            for ids, vectors in _blocks(bundle, space):
                flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
                writer.write_table(pa.table([pa.array(ids), flat], schema=schema))


def _hugectr(bundle: Bundle, folder: Path) -> None:
    for space in _spaces(bundle):
        model = folder / _file_name(space)
        model.mkdir()
        with (model / "key").open("wb") as keys, (model / "emb_vector").open("wb") as values:
            for ids, vectors in _blocks(bundle, space):
                keys.write(ids.astype("<i8").tobytes())
                values.write(vectors.astype("<f4").tobytes())


def _state_dict(bundle: Bundle, folder: Path) -> None:
    import torch

    state = {}
    for space in _spaces(bundle):
        blocks = [torch.from_numpy(vectors) for _, vectors in _blocks(bundle, space)]
        state[f"{space}.weight"] = torch.cat(blocks)
    with (folder / "tables.pt").open("wb") as file:  # given a path, torch does not say why a write failed
        torch.save(state, file)


KINDS: dict[str, Callable[[Bundle, Path], None]] = {
    "parquet": _parquet,
    "hugectr": _hugectr,
    "state_dict": _state_dict,
}
