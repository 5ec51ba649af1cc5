"""A bundle under fbgemm's quantised inference kernels: the rows as they are stored, never decoded in memory.

The kernels (IntNBitTableBatchedEmbeddingBagsCodegen) keep fp32, fp16, int8 and int4 rows as a bundle does: a float16
scale and a float16 offset a row, the first of two 4-bit numbers in the low half. So rows are copied, not quantised
again, and a vector of one id is the reader's bit for bit. A sum over a bag is formed inside the kernel, scale by
scale, and may differ from the reader's in the last place. fbgemm pads widths to a multiple of 4 (of 8 in int4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.serving.stored import Stored
from embtab.serving.tables import Group, Inputs, ServedTables, _cut, _weights


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
        plain, own = split(stored)
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


def split(stored: Stored) -> tuple[Tensor, Tensor | None]:
    """uint8 [R, bytes] of rows, and uint8 [R, 4] of their scales and offsets, as the kernels take them."""
    plain = torch.from_numpy(np.ascontiguousarray(stored.rows)).view(torch.uint8)
    if stored.scales is None:
        return plain, None
    both = np.stack([stored.scales, stored.offsets], axis=1)  # type: ignore[list-item]
    return plain, torch.from_numpy(both).view(torch.uint8)
