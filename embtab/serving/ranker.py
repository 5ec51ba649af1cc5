"""A whole ranker as one module: ids of every feature and numeric values in, logits out.

    dense float32 [B, N], ids.F, offsets.F  -->  logits float32 [B]

Features with a vector a row go to models such as `AutoInt`; where a feature is a history (pooling "none") the model is
one of sequences such as `DIN`, and the histories' offsets come once, as those of their first field.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from embtab.collections import EmbeddingBagCollection, EmbeddingCollection
from embtab.errors import UserError
from embtab.models.events import Events
from embtab.reader import Bundle
from embtab.serving.tables import Inputs, ServedTables
from embtab.training.checkpoint import described, load_tables, read_checkpoint
from embtab.training.layout import Layout


class Ranker(nn.Module):
    """Tables of a bundle and the model trained on them.

    Args:
        bundle: the tables.
        model: as `RankingTask` or `SequenceTask` call it, in evaluation mode.
        num_dense: N, numeric values of a row; without any there is no input `dense`.
        weighted: take a weight for every id of a feature that is pooled.
        single: features with one id in every row, which take no offsets.

    Raises:
        UserError: when a sequence model has attention tables of its own, or the features no target for a history.
    """

    def __init__(
        self, bundle: Bundle, model: nn.Module, num_dense: int, weighted: bool = False, single: Collection[str] = ()
    ) -> None:
        super().__init__()
        features = bundle.plan["features"]
        self.num_dense = num_dense
        self.layout: Layout | None = None
        if any(entry["pooling"] == "none" for entry in features):
            self.layout = Layout.of(ServedTables(bundle).plan.features)
            single = {*single, *self.layout.targets}
        self.tables = ServedTables(bundle, weighted, single)
        self.model = model.eval()

    def inputs(self) -> list[str]:
        """The names of the inputs, in order."""
        names = self.tables.inputs()
        if self.layout:
            names.append(f"offsets.{self.layout.histories[0]}")
        return ["dense"] * bool(self.num_dense) + names

    def outputs(self) -> list[str]:
        """The name of the output."""
        return ["logits"]

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """Logits [B] of a click."""
        vectors = {name.removeprefix("vectors."): found for name, found in self.tables(inputs).items()}
        return {"logits": self.ranked(inputs, vectors)}

    def ranked(self, inputs: Inputs, vectors: Mapping[str, Tensor]) -> Tensor:
        """Logits [B] from the vectors of every feature: [B, D], or [N, D] of a history."""
        if self.layout is None:
            stacked = torch.stack(list(vectors.values()), dim=1)
            logits: Tensor = self.model(self._dense(inputs, stacked), stacked)
            return logits
        layout = self.layout
        events = Events(
            torch.stack([vectors[name] for name in layout.targets], dim=1),
            torch.stack([vectors[name] for name in layout.histories], dim=1),
            inputs[f"offsets.{layout.histories[0]}"].diff(),
        )
        others = [vectors[feature.name] for feature in layout.others]
        first = events.target
        side = torch.stack(others, dim=1) if others else first.new_zeros(first.shape[0], 0, first.shape[2])
        ranked: Tensor = self.model(self._dense(inputs, first), side, events)
        return ranked

    def _dense(self, inputs: Inputs, vectors: Tensor) -> Tensor:
        return inputs["dense"] if self.num_dense else vectors.new_zeros(vectors.shape[0], 0)

    @torch.no_grad()
    def expected(self, bundle: Bundle, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs from the NumPy reader's vectors and the model in plain torch: what an export is compared with."""
        vectors = {}
        for feature in self.tables.plan.features:
            ids, name = inputs[f"ids.{feature.name}"], feature.name
            if self.tables.bagged(feature):
                found = bundle.lookup(name, ids, inputs[f"offsets.{name}"], inputs.get(f"weights.{name}"))
            else:
                found = bundle.vectors(name, ids)
            vectors[name] = torch.from_numpy(found)
        return {"logits": self.ranked({k: torch.from_numpy(v) for k, v in inputs.items()}, vectors).numpy()}


@dataclass(frozen=True)
class Trained:
    """What a checkpoint of `embtab fit` holds: tables, model, numeric columns, and facts about the run."""

    tables: EmbeddingBagCollection | EmbeddingCollection
    model: nn.Module
    num_dense: int
    about: dict[str, Any]


def load_trained(path: Path, config: Path | None = None) -> Trained:
    """The tables and the model of a checkpoint.

    Args:
        path: the checkpoint.
        config: the run's configuration, which names the model; by default config.yaml in the run's folder.

    Raises:
        UserError: when either cannot be read, or they do not belong together.
    """
    checkpoint = read_checkpoint(path)
    about = described(checkpoint, path)["about"]
    if "attention_plan" in about:
        raise UserError(f"{path}: has attention tables of its own, which only a bundle can hold; export bundles")
    if "dense" not in about:
        raise UserError(f"{path}: does not say how many numeric columns there are; it was not made by `embtab fit`")
    tables = load_tables(path)
    features = tables.plan.features
    sizes = [len(features)]
    if isinstance(tables, EmbeddingCollection):
        layout = Layout.of(features)
        sizes = [len(layout.others), len(layout.targets)]
    model = _made(config or path.parent.parent / "config.yaml", [len(about["dense"]), *sizes, tables.plan.dim])
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: is not of the configured model: {' '.join(str(error).split())[:300]}") from None
    return Trained(tables, model.eval(), len(about["dense"]), about)


def _made(config: Path, sizes: list[int]) -> nn.Module:
    """The model that a configuration names, untrained."""
    try:
        described = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["model"]
        module, _, name = described["class_path"].rpartition(".")
        made = getattr(importlib.import_module(module), name)(*sizes, **described.get("init_args", {}))
    except FileNotFoundError:
        raise UserError(f"{config}: no such file; give the run's configuration by --config") from None
    except UserError:
        raise
    except Exception as error:  # YAML, imports and constructors have errors of their own
        raise UserError(f"{config}: its model cannot be made: {error!r}") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"{config}: its model is a {type(made).__name__}, not a torch module")
    return made
