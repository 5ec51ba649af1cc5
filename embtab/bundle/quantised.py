"""Bundles as torchrec's quantised collections are called, and as those collections themselves."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import torchrec
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embtab.errors import UserError
from embtab.files import scratch
from embtab.planning.stored import plan_of
from embtab.reader import Bundle
from embtab.serving.quantised import QuantisedTables, split
from embtab.serving.stored import Stored
from embtab.tables.base import Collection

_PRECISIONS = {
    torch.int8: "int8",
    torch.qint8: "int8",
    torch.quint8: "int8",
    torch.quint4x2: "int4",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


class QuantisedCollection(nn.Module):
    """A bundle as torchrec's quantised collections are called: a KeyedJaggedTensor in, vectors out.

    Args:
        bundle: an opened bundle, or its folder.

    Returns a KeyedTensor with a vector of D numbers a feature; or, where the bundle holds histories (a feature whose
    pooling is "none"), a dict of JaggedTensor with a vector per id.
    """

    def __init__(self, bundle: Bundle | str | Path) -> None:
        super().__init__()
        opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        self.is_sequence = any(entry["pooling"] == "none" for entry in opened.plan["features"])
        self.tables = QuantisedTables(opened, single=opened.features if self.is_sequence else ())
        self.features = list(self.tables.plan.features)

    @classmethod
    def from_float(cls, module: Collection) -> QuantisedCollection:
        """Trained tables, quantised; torch's quantisation calls it where a mapping leads from their class to this one.

            quantize_embeddings(
                model,
                torch.qint8,
                inplace=True,
                additional_qconfig_spec_keys=[et.EmbeddingBagCollection],
                additional_mapping={et.EmbeddingBagCollection: QuantisedCollection},
            )

        Args:
            module: whose `qconfig` says the type of weights: int8 (qint8, quint8), quint4x2, float16 or float32.

        Raises:
            UserError: for another type, types table by table, or rows that cannot be stored in it.
        """
        from embtab.bundle.writer import save

        if getattr(module.qconfig, "per_table_weight_dtype", None):
            raise UserError("per_table_weight_dtype is not for embtab's tables, which are stored in one precision")
        kind = module.qconfig.weight().dtype
        if kind not in _PRECISIONS:
            raise UserError(f"tables cannot be quantised to {kind}; there are {', '.join(map(str, _PRECISIONS))}")
        with scratch() as folder:
            save(module, folder / "bundle", precision=_PRECISIONS[kind])
            return cls(folder / "bundle")

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | dict[str, JaggedTensor]:
        """The vectors of every feature of the plan.

        Raises:
            UserError: when an id is out of range, or a feature is missing.
        """
        weights = features.weights_or_none()
        given: dict[str, Tensor] = {}
        for feature in self.features:
            if feature.name not in features.keys():  # noqa: SIM118 (no dict)
                raise UserError(f"feature {feature.name!r} is not in the batch; it has {', '.join(features.keys())}")
            bags = features[feature.name]
            given[f"ids.{feature.name}"] = bags.values().long()
            given[f"offsets.{feature.name}"] = F.pad(bags.lengths().long().cumsum(0), (1, 0))
            if weights is not None and not self.is_sequence:
                given[f"weights.{feature.name}"] = bags.weights()
        found = self.tables(given)
        names = [feature.name for feature in self.features]
        if not self.is_sequence:
            return KeyedTensor(names, [self.tables.plan.dim] * len(names), torch.cat(list(found.values()), dim=1))
        return {name: JaggedTensor(found[f"vectors.{name}"], lengths=features[name].lengths()) for name in names}


def torchrec_collection(bundle: Bundle | str | Path) -> torchrec.quant.EmbeddingBagCollection:
    """Torchrec's own quantised collection, on a bundle's rows as they are stored.

    It reads one row per id, so it is for bundles whose id spaces are all dense; others are `QuantisedCollection`'s.

    Args:
        bundle: an opened bundle, or its folder; features are summed or averaged over bags.

    Raises:
        UserError: when a space is not dense, a feature is not pooled, two of one space are pooled differently, or the
            width is none that the kernels have.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    plan = plan_of(opened)
    configs, weights = [], {}
    for space, encoding in plan.encodings.items():
        features = [feature for feature in plan.features if feature.space == space]
        precision, pooling = plan.tables[encoding.tables[0]].precision, features[0].pooling
        if encoding.method != "dense":
            raise UserError(f"{space!r} is {encoding.method}: torchrec's collection reads only dense tables")
        if any(feature.pooling != pooling for feature in features) or pooling == "none":
            raise UserError(f"{space!r}: torchrec's collection needs one pooling for a table, sum or mean")
        if plan.dim % (8 if precision == "int4" else 4):
            raise UserError(f"a width of {plan.dim} is none of the kernels' in {precision}; take QuantisedCollection")
        table = EmbeddingBagConfig(
            name=space,
            num_embeddings=plan.tables[encoding.tables[0]].num_rows,
            embedding_dim=plan.dim,
            feature_names=[feature.name for feature in features],
            pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
            data_type=DataType[precision.upper()],
        )
        configs.append(table)
        weights[space] = split(Stored.of([opened.tables[encoding.tables[0]]]))
    return torchrec.quant.EmbeddingBagCollection(
        configs, is_weighted=False, device=torch.device("cpu"), table_name_to_quantized_weights=weights, row_alignment=1
    )
