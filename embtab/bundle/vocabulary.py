"""The vocabulary inside a bundle: raw values in the order of their ids, as UTF-8 bytes and where each value ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import vocabulary_path
from embtab.planning import Plan

Vocabulary = Mapping[str, Sequence[str | None]] | str | Path


def vocabulary_tensors(vocab: Vocabulary, plan: Plan) -> dict[str, Tensor]:
    """uint8 "bytes.FEATURE" and int64 "ends.FEATURE" [num_ids] of each feature that has a vocabulary.

    Raises:
        UserError: for an unknown feature, a wrong number of values, or a value that stands twice.
    """
    values = _of_dataset(Path(vocab), plan) if isinstance(vocab, str | Path) else vocab
    num_ids = {feature.name: feature.num_ids for feature in plan.features}
    tensors: dict[str, Tensor] = {}
    for feature, raw in values.items():
        if feature not in num_ids:
            raise UserError(f"vocab names a feature {feature!r} that is not there; there are {', '.join(num_ids)}")
        if len(raw) != num_ids[feature]:
            raise UserError(f"vocab of feature {feature!r} has {len(raw)} values for {num_ids[feature]} ids")
        if len(set(raw)) != len(raw):
            raise UserError(f"vocab of feature {feature!r} holds a value twice")
        encoded = [(value or "").encode() for value in raw]
        tensors[f"bytes.{feature}"] = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        tensors[f"ends.{feature}"] = torch.tensor([len(each) for each in encoded], dtype=torch.int64).cumsum(0)
    return tensors


def _of_dataset(folder: Path, plan: Plan) -> dict[str, list[str | None]]:
    """The vocabularies of a prepared dataset folder, where its ids come from raw values."""
    import pyarrow.parquet as pq

    found: dict[str, list[str | None]] = {}
    for feature in plan.features:
        path = vocabulary_path(folder, feature.name)
        if path.exists() and "value" in pq.read_schema(path).names:
            found[feature.name] = pq.read_table(path, columns=["value"])["value"].to_pylist()
    if not found:
        raise UserError(
            f"{folder}: no vocabulary of any feature of the tables (vocab/NAME.parquet with a column value)"
        )
    return found
