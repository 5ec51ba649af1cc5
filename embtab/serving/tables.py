"""The tables of a bundle as a torch module of the plainest operators, for everything that compiles or exports.

    ids.F int64 [N], offsets.F int64 [B + 1], weights.F float32 [N]  -->  vectors.F float32 [B, D]
    ids int64 [B, F]                                                 -->  vectors float32 [B, F, D], stacked

Rows stay stored as the bundle stores them (float16, int8, int4) and are decoded where they are read, so an export is as
small as the bundle. Ids outside a feature's range read a row that no table has: an error in every runtime, where
without it some would count from the end, and answer.

Features whose encodings differ only in constants are computed together, and tables of one width and precision are
stacked: the program of 26 features is hardly longer than that of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.features import Feature
from embtab.methods import Encoding
from embtab.planning.stored import plan_of
from embtab.reader import Bundle
from embtab.serving.capture import in_memory
from embtab.serving.stored import Stored, StoredTable

Inputs = Mapping[str, Tensor]
NO_ROW = 2**40  # above any table's rows


@dataclass(frozen=True)
class Group:
    """Features that are computed together.

    Attributes:
        features: F of them; their encodings differ in nothing but constants, and pooling is the same.
        encoding: of the first.
        stacks: for each of the K parts the stack that its table is in.
        constants: the buffer of each constant, [F, 1 or K].
        limits: the buffer of the number of ids, [F, 1].
        bases: the buffer of the tables' first rows in their stacks, [F, K].
        arrays: the buffer of each array.
        bagged: whether ids come as bags that are pooled.
    """

    features: tuple[Feature, ...]
    encoding: Encoding
    stacks: tuple[str, ...]
    constants: Mapping[str, str]
    limits: str
    bases: str
    arrays: Mapping[str, str]
    bagged: bool


class ServedTables(nn.Module):
    """Every feature of a bundle, from ids to vectors.

    Args:
        bundle: an opened bundle.
        weighted: take a weight for every id of a feature that is pooled.
        single: features that have one id in every row: they take no offsets.
        stacked: all features have one id in every row, and come as one input `ids` int64 [B, F], in plan order.

    Raises:
        UserError: for a name in `single` that is no feature, or a history among features that are stacked.
    """

    def __init__(
        self, bundle: Bundle, weighted: bool = False, single: Collection[str] = (), stacked: bool = False
    ) -> None:
        super().__init__()
        self.plan = plan_of(bundle)
        self.weighted = weighted
        for name in single:
            if name not in bundle.features:
                raise UserError(f"no feature {name!r} to have one id a row; there are {', '.join(bundle.features)}")
        for feature in self.plan.features:
            if stacked and feature.pooling == "none":
                raise UserError(f"feature {feature.name!r} is a history: features of one id a row alone are stacked")
        self.is_stacked = stacked
        self.single = frozenset(bundle.features if stacked else single)
        self.stack_of, self.base = self._stacked(bundle)
        grouped: dict[tuple, list[Feature]] = {}
        for feature in self.plan.features:
            encoding = self.plan.encodings[feature.space]
            stacks = tuple(self.stack_of[name] for name in encoding.tables)
            alone = feature.space if encoding.arrays() else None
            bagged = self.bagged(feature)
            key = (type(encoding), encoding.variant, encoding.num_ids is None, stacks, alone, bagged, feature.pooling)
            grouped.setdefault(key if bagged else key[:-1], []).append(feature)
        self.groups = [self._group(bundle, members) for members in grouped.values()]
        self.names = [feature.name for feature in self.plan.features]
        self.computed = [feature.name for group in self.groups for feature in group.features]
        self.is_mixed = self.computed != self.names
        self.register_buffer("order", torch.tensor([self.computed.index(name) for name in self.names]))
        self.register_buffer("columns", torch.tensor([self.names.index(name) for name in self.computed]))

    def _stacked(self, bundle: Bundle) -> tuple[dict[str, str], dict[str, int]]:
        """The stack that each table is in, and its first row there."""
        members: dict[str, list[str]] = {}
        for name, table in self.plan.tables.items():
            members.setdefault(f"{table.precision}x{table.width}", []).append(name)
        base: dict[str, int] = {}
        for stack, names in members.items():
            sizes = np.cumsum([0] + [self.plan.tables[name].num_rows for name in names]).tolist()
            base |= dict(zip(names, sizes[:-1], strict=True))
            self.add_module(stack, self.stack(Stored.of([bundle.tables[name] for name in names]), stack))
        return {name: stack for stack, names in members.items() for name in names}, base

    def stack(self, stored: Stored, name: str) -> nn.Module:
        """What reads the rows of stacked tables: int64 [...] -> float32 [..., W]."""
        return StoredTable(stored)

    def _group(self, bundle: Bundle, features: Sequence[Feature]) -> Group:
        encodings = [self.plan.encodings[feature.space] for feature in features]
        first, space = encodings[0], features[0].space
        made = f"group_of_{len(list(self.buffers(recurse=False)))}"

        def keep(name: str, value: Tensor) -> str:
            place = f"{made}_{name}"
            self.register_buffer(place, value)
            return place

        each = [encoding.constants() for encoding in encodings]
        constants = {name: keep(name, torch.tensor([one[name] for one in each])) for name in each[0]}
        bases = torch.tensor([[self.base[name] for name in encoding.tables] for encoding in encodings])
        limits = torch.tensor([[encoding.num_ids or 0] for encoding in encodings])
        arrays = {
            name: keep(f"array_{name}", torch.from_numpy(np.array(bundle.tables[f"{space}.{name}"])))
            for name, spec in first.arrays().items()
            if spec.serving
        }
        stacks = tuple(self.stack_of[name] for name in first.tables)
        kept = keep("limits", limits), keep("bases", bases)
        return Group(tuple(features), first, stacks, constants, *kept, arrays, self.bagged(features[0]))

    def bagged(self, feature: Feature) -> bool:
        """Whether a feature's ids come as bags that are pooled."""
        return feature.pooling != "none" and feature.name not in self.single

    def inputs(self) -> list[str]:
        """The names of the inputs, in order."""
        if self.is_stacked:
            return ["ids"]
        names = []
        for feature in self.plan.features:
            names.append(f"ids.{feature.name}")
            if self.bagged(feature):
                names += [f"offsets.{feature.name}"] + [f"weights.{feature.name}"] * self.weighted
        return names

    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return ["vectors"] if self.is_stacked else [f"vectors.{name}" for name in self.names]

    def ids_of(self, inputs: Mapping[str, Any], name: str) -> Any:
        """int64 [N]: the ids of a feature among the inputs, be they tensors or arrays."""
        return inputs["ids"][:, self.names.index(name)] if self.is_stacked else inputs[f"ids.{name}"]

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """By output, float32 [B, D] where a feature's bags are pooled, else a vector per id [N, D]; or [B, F, D].

        Args:
            inputs: as `inputs` names them: ids int64 [N]; offsets int64 [B + 1], bag b being
                ids[offsets[b]:offsets[b + 1]]; weights float32 [N]; or ids int64 [B, F] of features that are stacked.
        """
        if self.is_stacked:
            return {"vectors": self.of_batch(inputs)}
        found: dict[str, Tensor] = {}
        for group in self.groups:
            found |= self._outputs(group, inputs)
        return {name: found[name] for name in self.outputs()}

    def of_batch(self, inputs: Inputs) -> Tensor:
        """float32 [B, F, D], features in plan order: all vectors of B rows at once.

        Where every feature has one id in every row, a batch is a handful of operations whatever the number of features.

        Args:
            inputs: as of `forward`; every feature must have a vector a row.
        """
        if not self.single.issuperset(self.names):
            return torch.stack(list(self(inputs).values()), dim=1)
        each = list(zip(self.groups, self._ids_of_batch(inputs), strict=True))
        if all(group.encoding.bare for group in self.groups) and len({group.stacks for group in self.groups}) == 1:
            # Each vector is a row of one stack: rows are put in order, for vectors are longer.
            rows = self._in_order([self._rows_of_batch(group, ids)[0] for group, ids in each])
            return in_memory(self._read(self.groups[0].stacks[0], rows))
        return in_memory(self._in_order([self._vectors_of_batch(group, ids) for group, ids in each]))

    def _vectors_of_batch(self, group: Group, ids: Tensor) -> Tensor:
        """float32 [B, F, D] of a group's ids [B, F]."""
        rows, arrays = self._rows_of_batch(group, ids)
        return self._read(group.stacks[0], rows) if group.encoding.bare else self._combined(group, rows, arrays)

    def _rows_of_batch(self, group: Group, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `rows` of a group's ids [B, F]: [B, K, F], but [B, F] where a vector is one row as it stands."""
        bare = group.encoding.bare
        if not group.arrays:
            return self.rows(group, ids if bare else ids.unsqueeze(1), None)
        rows, arrays = self.rows(group, ids.unsqueeze(-1), None)
        return rows.squeeze(-1) if bare else rows.movedim(-1, 1), arrays

    def _ids_of_batch(self, inputs: Inputs) -> Sequence[Tensor]:
        """int64 [B, F] of each group."""
        if self.is_stacked:
            ids = inputs["ids"].index_select(1, self.get_buffer("columns")) if self.is_mixed else inputs["ids"]
        else:
            joined = torch.cat([inputs[f"ids.{name}"] for name in self.computed])
            ids = joined.view(len(self.computed), -1).t()
        return ids.split([len(group.features) for group in self.groups], dim=1) if len(self.groups) > 1 else [ids]

    def _in_order(self, each: Sequence[Tensor]) -> Tensor:
        """What the groups have, [B, F, ...], in plan order."""
        joined = each[0] if len(each) == 1 else torch.cat(list(each), dim=1)
        return joined.index_select(1, self.get_buffer("order")) if self.is_mixed else joined

    def _outputs(self, group: Group, inputs: Inputs) -> dict[str, Tensor]:
        names = [feature.name for feature in group.features]
        ids = [inputs[f"ids.{name}"] for name in names]
        # shape[0], not len(): that would make constants of the lengths in an export.
        sizes = [each.shape[0] for each in ids]
        vectors = self.vectors(group, torch.cat(ids), sizes)
        if group.bagged:
            offsets = [inputs[f"offsets.{name}"] for name in names]
            vectors = pool(vectors, offsets, sizes, group.features[0].pooling, _weights(names, inputs))
            sizes = [each.shape[0] - 1 for each in offsets]
        return {f"vectors.{name}": part for name, part in zip(names, _cut(vectors, sizes), strict=True)}

    def vectors(self, group: Group, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """float32 [N, D]: the vectors of ids [N] of a group's features, which have as many ids each as `sizes` says."""
        rows, arrays = self.rows(group, ids.unsqueeze(1), sizes)
        return self._combined(group, rows, arrays)

    def rows(self, group: Group, ids: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """int64 [N, K]: where each part stands in its stack, -1 for a part that is not there; and the arrays.

        Args:
            group: the features.
            ids: int64 [N, 1], feature after feature; or [B, 1, F], for rows [B, K, F] (or [B, F], if K is 1), since
                long runs are quick; but of a group with arrays [B, F, 1], for rows [B, F, K].
            sizes: how many ids each feature has; None where each has one in every row.
        """
        encoding = group.encoding
        constants = {name: self._constant(group, place, sizes) for name, place in group.constants.items()}
        arrays = {name: self.get_buffer(place) for name, place in group.arrays.items()}
        if encoding.num_ids is None:
            rows = encoding.rows(ids, constants | arrays)
        else:
            outside = (ids < 0) | (ids >= self._constant(group, group.limits, sizes))
            inside = torch.where(outside, NO_ROW, ids) if arrays else ids  # arrays are read at ids
            rows = torch.where(outside, NO_ROW, encoding.rows(inside, constants | arrays))
        if not group.stacks:
            return rows, arrays
        shifted = rows + self._constant(group, group.bases, sizes)
        return torch.where(rows < 0, -1, shifted) if encoding.may_skip else shifted, arrays

    def _constant(self, group: Group, place: str, sizes: Sequence[int] | None) -> Tensor:
        """A constant of every feature, for ids as `rows` takes them."""
        constants = self.get_buffer(place)
        if sizes is not None:
            return _spread(constants, sizes)
        return constants if group.arrays else constants.t()

    def _combined(self, group: Group, rows: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """float32 [N, D] or [B, F, D]: vectors whose parts are the rows [N, K] or [B, K, F] of the group's stacks."""
        if group.encoding.joining == "concat" and len(set(group.stacks)) == 1 and not group.encoding.may_skip:
            read = self._read(group.stacks[0], rows.movedim(1, -1))  # side by side already
            return in_memory(read).flatten(-2)
        parts = [self._part(group, stack, rows.select(1, k)) for k, stack in enumerate(group.stacks)]
        return group.encoding.combine(parts or [rows.movedim(1, -1)], arrays)

    def _part(self, group: Group, stack: str, rows: Tensor) -> Tensor:
        """float32 [..., W]; a part that is not there is zero."""
        if not group.encoding.may_skip:
            return self._read(stack, rows)
        return torch.where((rows >= 0).unsqueeze(-1), self._read(stack, rows.clamp(min=0)), 0.0)

    def _read(self, stack: str, rows: Tensor) -> Tensor:
        """[..., W]: rows [...] of a stack."""
        read: Tensor = self.get_submodule(stack)(in_memory(rows))
        return read


def _weights(names: Sequence[str], inputs: Inputs) -> Tensor | None:
    """float32 [N]: the weights of features' ids, where they have any."""
    if f"weights.{names[0]}" not in inputs:
        return None
    return torch.cat([inputs[f"weights.{name}"] for name in names])


def _spread(constants: Tensor, sizes: Sequence[int]) -> Tensor:
    """[N, K] from a constant of every feature [F, K]; [1, K] for one feature."""
    if len(sizes) == 1:
        return constants
    each = zip(constants, sizes, strict=True)
    return torch.cat([constant.unsqueeze(0).expand(size, -1) for constant, size in each])


def _cut(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Pieces of the given lengths."""
    if len(sizes) == 1:
        return [values]
    pieces, start = [], 0
    for size in sizes:
        pieces.append(values.narrow(0, start, size))
        start = start + size
    return pieces


def owners(ends: Tensor, total: int) -> Tensor:
    """int64 [N]: the bag of each of N = `total` ids, from where each bag ends [B]; exporters know it all."""
    marks = torch.zeros(total + 1, dtype=torch.int64, device=ends.device)
    return marks.scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:-1]


def pool(
    vectors: Tensor, offsets: Sequence[Tensor], sizes: Sequence[int], pooling: str, weights: Tensor | None = None
) -> Tensor:
    """float32 [F * B, D]: sums or means of (weighted) vectors [N, D] over bags; zeros for an empty bag.

    Args:
        vectors: feature after feature.
        offsets: int64 [B + 1] of every feature.
        sizes: ids of every feature.
        pooling: "sum" or "mean".
        weights: float32 [N], or None.
    """
    if weights is not None:
        vectors = vectors * weights.unsqueeze(1)
    ends, start = [], 0
    for each, size in zip(offsets, sizes, strict=True):
        ends.append(each[1:] + start)
        start = start + size
    last = torch.cat(ends)
    bags = owners(last, vectors.shape[0])
    sums = vectors.new_zeros(last.shape[0], vectors.shape[1]).index_put((bags,), vectors, accumulate=True)
    if pooling == "sum":
        return sums
    return sums / torch.cat([each.diff() for each in offsets]).clamp(min=1).unsqueeze(1)
