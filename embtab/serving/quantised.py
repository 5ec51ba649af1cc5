"""A bundle under fbgemm's quantised inference kernels: the rows as they are stored, never decoded in memory.

The kernels (IntNBitTableBatchedEmbeddingBagsCodegen) keep fp32, fp16, int8 and int4 rows as a bundle does: a float16
scale and a float16 offset a row, the first of two 4-bit numbers in the low half. So rows are copied, not quantised
again, and a vector of one id is the reader's bit for bit. A sum over a bag is formed inside the kernel, scale by
scale, and may differ from the reader's in the last place. fbgemm pads widths to a multiple of 4 (of 8 in int4).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchrec
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embtab.bundle import plan_of
from embtab.collections import Collection
from embtab.errors import UserError
from embtab.files import scratch
from embtab.reader import Bundle
from embtab.serving.stored import Stored
from embtab.serving.tables import Group, Inputs, ServedTables, _cut, _weights

_PRECISIONS = {
    torch.int8: "int8",
    torch.qint8: "int8",
    torch.quint8: "int8",
    torch.quint4x2: "int4",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


class NBitTable(nn.Module):
    """Stacked tables in one quantised kernel: rows int64 [...] -> float32 [..., W], or sums over bags of them."""

    def __init__(self, stored: Stored, precision: str) -> None:
        super().__init__()
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

        self.width = stored.width
        kind = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}
        multiple = 8 if precision == "int4" else 4
        padded = -(-stored.width // multiple) * multiple
        self.kernel: Any = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("stack", max(len(stored.rows), 1), padded, kind[precision], EmbeddingLocation.HOST)],
            device="cpu",
            output_dtype=SparseType.FP32,
            bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked before
        )
        self.kernel.initialize_weights()
        held, marks = self.kernel.split_embedding_weights(split_scale_shifts=stored.scales is not None)[0]
        plain, own = _split(stored)
        held.zero_()
        held[: len(plain), : plain.shape[1]] = plain
        if own is not None:
            marks[: len(plain)] = own

    def forward(self, rows: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """float32 [B, W]: (weighted) sums of rows [N] over bags of offsets [B + 1]; [..., W], the rows, without."""
        bags = torch.arange(rows.numel() + 1) if offsets is None else offsets
        sums: Tensor = self.kernel(rows.flatten().contiguous(), bags, weights)  # it takes no strides into account
        return sums[:, : self.width].unflatten(0, rows.shape if offsets is None else [-1])


class QuantisedTables(ServedTables):
    """`ServedTables` on quantised kernels, which also sum the bags of methods whose parts may be summed first."""

    def stack(self, stored: Stored, name: str) -> nn.Module:
        """A kernel for every width and precision."""
        return NBitTable(stored, name.partition("x")[0])

    def _outputs(self, group: Group, inputs: Inputs) -> dict[str, Tensor]:
        if not (group.bagged and group.stacks and group.encoding.linear) or group.encoding.may_skip:
            return super()._outputs(group, inputs)
        names = [feature.name for feature in group.features]
        ids = [inputs[f"ids.{name}"] for name in names]
        sizes = [len(each) for each in ids]
        rows, arrays = self.rows(group, torch.cat(ids).unsqueeze(1), sizes)
        offsets = [inputs[f"offsets.{name}"] for name in names]
        lengths = torch.cat([each.diff() for each in offsets])
        weights = _weights(names, inputs)
        bags = F.pad(lengths.cumsum(0), (1, 0))
        parts = [self.get_submodule(stack)(rows[:, k], bags, weights) for k, stack in enumerate(group.stacks)]
        sums = group.encoding.combine(parts, arrays)
        if group.features[0].pooling == "mean":
            sums = sums / lengths.clamp(min=1).unsqueeze(1)
        pieces = _cut(sums, [len(each) - 1 for each in offsets])
        return {f"vectors.{name}": part for name, part in zip(names, pieces, strict=True)}

    def rows(self, group: Group, ids: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As its parent's; ids out of range are refused here, since the kernels look at no bounds.

        Raises:
            UserError: when an id is out of range.
        """
        if group.encoding.num_ids is not None:
            outside = (ids < 0) | (ids >= self._constant(group, group.limits, sizes))
            if bool(outside.any()):
                self._refuse(group, ids, outside, sizes)
        return super().rows(group, ids, sizes)

    def _refuse(self, group: Group, ids: Tensor, outside: Tensor, sizes: Sequence[int] | None) -> None:
        if sizes is None:  # a feature is a column
            ids, outside = (each.reshape(-1, len(group.features)).t() for each in (ids, outside))
            sizes = [ids.shape[1]] * len(group.features)
        parts = ids.flatten().split(list(sizes)), outside.flatten().split(list(sizes))
        for feature, own, bad in zip(group.features, *parts, strict=True):
            if bool(bad.any()):
                raise UserError(f"feature {feature.name!r}: id {int(own[bad][0])} is outside [0, {feature.num_ids})")


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
        from embtab.bundle import save

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
        weights[space] = _split(Stored.of([opened.tables[encoding.tables[0]]]))
    return torchrec.quant.EmbeddingBagCollection(
        configs, is_weighted=False, device=torch.device("cpu"), table_name_to_quantized_weights=weights, row_alignment=1
    )


def _split(stored: Stored) -> tuple[Tensor, Tensor | None]:
    """uint8 [R, bytes] of rows, and uint8 [R, 4] of their scales and offsets, as the kernels take them."""
    plain = torch.from_numpy(np.ascontiguousarray(stored.rows)).view(torch.uint8)
    if stored.scales is None:
        return plain, None
    both = np.stack([stored.scales, stored.offsets], axis=1)  # type: ignore[list-item]
    return plain, torch.from_numpy(both).view(torch.uint8)
