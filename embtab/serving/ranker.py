"""A whole ranker as one module: ids of every feature and numeric values in, logits out.

    dense float32 [B, N], ids.F, offsets.F       -->  logits float32 [B]
    dense float32 [B, N], ids int64 [B, F]       -->  the same, stacked

Features with a vector a row go to models such as `AutoInt`; where a feature is a history (pooling "none") the model is
one of sequences such as `DIN`, and the histories' offsets come once, as those of their first field.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models.events import Events
from embtab.reader import Bundle
from embtab.serving.tables import Inputs, ServedTables
from embtab.tables import EmbeddingBagCollection, EmbeddingCollection
from embtab.training.checkpoint import described, load_tables, read_checkpoint
from embtab.training.layout import Layout
from embtab.training.trust import allowed, imported
from embtab.yaml_files import load_yaml


class Ranker(nn.Module):
    """Tables of a bundle and the model trained on them.

    Args:
        bundle: the tables.
        model: as `RankingTask` or `SequenceTask` call it, in evaluation mode.
        num_dense: N, numeric values of a row; without any there is no input `dense`.
        weighted: take a weight for every id of a feature that is pooled.
        single: features with one id in every row, which take no offsets.
        stacked: all features have one id in every row, and come as one input `ids` int64 [B, F], in plan order.
        attention: the tables of a model whose attention has its own, of the target and the history.

    Raises:
        UserError: when the features have no target for a history, or one is to be stacked.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: nn.Module,
        num_dense: int,
        weighted: bool = False,
        single: Collection[str] = (),
        attention: Bundle | None = None,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        features = bundle.plan["features"]
        self.num_dense = num_dense
        self.layout: Layout | None = None
        if any(entry["pooling"] == "none" for entry in features):
            self.layout = Layout.of(ServedTables(bundle).plan.features)
            single = {*single, *self.layout.targets}
        self.tables = ServedTables(bundle, weighted, single, stacked)
        self.attention: ServedTables | None = None
        if attention is not None:
            assert self.layout is not None
            self.attention_bundle = attention
            self.attention = ServedTables(attention, single=self.layout.targets)
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
        if self.layout is None:
            return {"logits": self._pooled(inputs, self.tables.of_batch(inputs))}
        attention = None if self.attention is None else _by_feature(self.attention(inputs))
        return {"logits": self.ranked(inputs, _by_feature(self.tables(inputs)), attention)}

    def ranked(
        self, inputs: Inputs, vectors: Mapping[str, Tensor], attention: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits [B] from the vectors of every feature: [B, D], or [N, D] of a history."""
        if self.layout is None:
            return self._pooled(inputs, torch.stack(list(vectors.values()), dim=1))
        events = [self._events(inputs, each) for each in (vectors, attention) if each is not None]
        others = [vectors[feature.name] for feature in self.layout.others]
        first = events[0].target
        side = torch.stack(others, dim=1) if others else first.new_zeros(first.shape[0], 0, first.shape[2])
        ranked: Tensor = self.model(self._dense(inputs, first), side, *events)
        return ranked

    def _pooled(self, inputs: Inputs, stacked: Tensor) -> Tensor:
        """Logits [B] from the vectors [B, F, D] of features that have one a row."""
        logits: Tensor = self.model(self._dense(inputs, stacked), stacked)
        return logits

    def _events(self, inputs: Inputs, vectors: Mapping[str, Tensor]) -> Events:
        assert self.layout is not None
        return Events(
            torch.stack([vectors[name] for name in self.layout.targets], dim=1),
            torch.stack([vectors[name] for name in self.layout.histories], dim=1),
            inputs[f"offsets.{self.layout.histories[0]}"].diff(),
        )

    def _dense(self, inputs: Inputs, vectors: Tensor) -> Tensor:
        return inputs["dense"] if self.num_dense else vectors.new_zeros(vectors.shape[0], 0)

    @torch.no_grad()
    def expected(self, bundle: Bundle, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs from the NumPy reader's vectors and the model in plain torch: what an export is compared with."""
        vectors = _read(bundle, self.tables, inputs)
        attention = None if self.attention is None else _read(self.attention_bundle, self.attention, inputs)
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return {"logits": self.ranked(given, vectors, attention).numpy()}


def _by_feature(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vectors."): vectors for name, vectors in found.items()}


def _read(bundle: Bundle, tables: ServedTables, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The NumPy reader's vectors of every feature."""
    vectors = {}
    for feature in tables.plan.features:
        ids, name = tables.ids_of(inputs, feature.name), feature.name
        if tables.bagged(feature):
            found = bundle.lookup(name, ids, inputs[f"offsets.{name}"], inputs.get(f"weights.{name}"))
        else:
            found = bundle.vectors(name, ids)
        vectors[name] = torch.from_numpy(found)
    return vectors


@dataclass(frozen=True)
class Trained:
    """What a checkpoint of `embtab fit` holds: tables, model, numeric columns, facts about the run, and the tables that
    the model's attention has to itself.
    """

    tables: EmbeddingBagCollection | EmbeddingCollection
    model: nn.Module
    num_dense: int
    about: dict[str, Any]
    attention: EmbeddingCollection | None = None


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
    attention = load_tables(path, part="attention") if "attention_plan" in about else None
    assert not isinstance(attention, EmbeddingBagCollection)
    return Trained(tables, model.eval(), len(about["dense"]), about, attention)


def _made(config: Path, sizes: list[int]) -> nn.Module:
    """The model that a configuration names, untrained."""
    try:
        described = load_yaml(config.read_text(encoding="utf-8"))["model"]["model"]
        made = imported(described["class_path"], allowed())(*sizes, **described.get("init_args", {}))
    except FileNotFoundError:
        raise UserError(f"{config}: no such file; give the run's configuration by --config") from None
    except UserError as error:
        raise UserError(f"{config}: {error}") from None
    except Exception as error:  # YAML, imports and constructors have errors of their own
        raise UserError(f"{config}: its model cannot be made: {error!r}") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"{config}: its model is a {type(made).__name__}, not a torch module")
    return made
