"""Blocks: features that are computed together, and the arrays that their encodings have.

N ids of a block   F features of a block   B bags per feature   K parts per id   W width of a part   D dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.features import Feature
from embtab.lookup.base import Lookup, Request, slot
from embtab.lookup.named_state import NamedState, Place, at, planted
from embtab.methods.base import Encoding
from embtab.planning import Plan
from embtab.tables.batch import Cut


class Arrays(NamedState):
    """The arrays that encodings have beside their tables: trained ones are parameters, integer ones are buffers.

    They are called "space.name", and those that only training needs "space.name.training".
    """

    def __init__(self, encodings: Mapping[str, Encoding], device: torch.device | str) -> None:
        super().__init__()
        self.places: dict[str, dict[str, Place]] = {space: {} for space in encodings}
        self.saved: dict[bool, dict[str, Place]] = {True: {}, False: {}}
        for space, encoding in encodings.items():
            for name, array in encoding.arrays().items():
                value = torch.zeros(array.shape, dtype=getattr(torch, array.dtype), device=device)
                called = f"{space}.{name}" if array.serving else f"{space}.{name}.training"
                place = planted(self, called, nn.Parameter(value) if array.dtype == "float32" else value)
                self.places[space][name] = self.saved[array.serving][called] = place

    def of(self, space: str) -> dict[str, Tensor]:
        """The arrays of one id space, by name."""
        return {name: at(place) for name, place in self.places[space].items()}

    def named_state(self) -> dict[str, Tensor]:
        """The arrays that serving needs."""
        return {name: at(place).detach() for name, place in self.saved[True].items()}

    def optional_state(self) -> dict[str, Tensor]:
        """The arrays that only training needs; without them, counting starts anew."""
        return {name: at(place) for name, place in self.saved[False].items()}

    def is_optional(self, name: str) -> bool:
        """Whether it is an array that only training needs."""
        return name in self.saved[False]


IN_CACHE = 1 << 17
"""Rows that are computed in one go on a CPU."""


class Block(nn.Module):
    """Features whose encodings differ only in constants; or, where an encoding has arrays, the features of one space.

    Args:
        places: where the F features stand in the plan, in ascending order.
        features: the features.
        encodings: the encoding of each.
        widths: the widths of the K parts.
        bases: int64 [F, K], the offset of each part's table in the lookup's matrix.
        arrays: the arrays of all encodings.
        everyones: the ids that an adaptive encoding takes note of, from those of a batch; see `Lookup.everyones`.
    """

    def __init__(
        self,
        places: Sequence[int],
        features: Sequence[Feature],
        encodings: Sequence[Encoding],
        widths: Sequence[int],
        bases: Tensor,
        arrays: Arrays,
        everyones: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.all_arrays = [arrays]  # in a list, so that they stay the collection's
        self.everyones = everyones
        self.places, self.features = list(places), list(features)
        self.encoding = encodings[0]
        self.compute: Callable[[Tensor, Mapping[str, Tensor]], Tensor] = self.encoding.rows
        self.fused = False
        self.widths = list(widths)
        self.slots = [[slot(feature.name, k) for feature in features] for k in range(len(self.widths))]
        self.limits = [encoding.num_ids for encoding in encodings]
        constants = [encoding.constants() for encoding in encodings]
        self.names = list(constants[0])
        self._buffer("bases", bases)
        for name in self.names:
            self._buffer(name, torch.tensor([each[name] for each in constants]))
        if self.encoding.arithmetic:
            of_parts = [self.get_buffer(f"{name}_").expand(bases.shape) for name in self.names]
            of_parts += [torch.zeros_like(bases)] * (3 - len(of_parts))
            self._buffer("arithmetic", torch.stack(of_parts, dim=-1))

    def _buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(f"{name}_", value, persistent=False)

    def fuse(self) -> None:
        """From now on rows are computed in one pass over the ids, by torch.compile."""
        self.compute, self.fused = _compiled(type(self.encoding)), True

    def set_bases(self, bases: Tensor) -> None:
        """Changes the offsets of the parts' tables: int64 [F, K]."""
        self.get_buffer("bases_").copy_(bases)

    def _spread(self, name: str, sizes: Sequence[int], which: slice) -> Tensor:
        """A constant [F, K] for ids laid out feature after feature: [F, 1, K] for equal sizes, else [N, K]."""
        constant = self.get_buffer(f"{name}_")[which]
        if len(set(sizes)) == 1:
            return constant.unsqueeze(1)
        return constant.repeat_interleave(torch.tensor(sizes, device=constant.device), dim=0, output_size=sum(sizes))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the block's encoding, by name."""
        return self.all_arrays[0].of(self.features[0].space) if self.encoding.arrays() else {}

    def rows(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """int64 [N, K]: rows of every part; -1 where an id does not have it.

        In training mode an adaptive encoding takes note of the ids.

        Args:
            ids: int64 [N], feature after feature, which `check` has seen.
            sizes: how many ids each feature has.
        """
        turns = self._in_turn(ids)
        if len(turns) == 1:
            return self._rows(ids, sizes, slice(None))
        each = zip(ids.split(list(sizes)), sizes, turns, strict=True)
        return torch.cat([self._rows(part, [size], which) for part, size, which in each])

    def placed_rows(self, ids: Tensor, sizes: Sequence[int], lookup: Lookup) -> Tensor:
        """int64 [K, N]: the same as rows of the lookup's matrices; for encodings that have all parts of every id."""
        if lookup.joins and self.encoding.arithmetic:
            given = self.get_buffer("bases_"), self.get_buffer("arithmetic_")
            return lookup.placed_rows(self.encoding.arithmetic, ids, sizes, *given)
        # Ids last: there are many of them, and loops over the last dimension are the quick ones.
        same = len(set(sizes)) == 1
        shaped = ids.view(1, len(sizes), -1) if same else ids.unsqueeze(0)
        placed = ids.new_empty(len(self.widths), *shaped.shape[1:])
        for which in self._in_turn(ids) if same else [slice(None)]:
            constants = {name: self._by_part(name, sizes, which) for name in ["bases", *self.names]}
            base = constants.pop("bases")
            torch.add(self.compute(shaped[:, which], constants | self.arrays), base, out=placed[:, which])
        self._observe(ids)
        return placed.view(len(self.widths), len(ids))

    def _by_part(self, name: str, sizes: Sequence[int], which: slice) -> Tensor:
        """A constant [F, K] as [K, F, 1], or as [K, N] where features have different numbers of ids."""
        constant = self._spread(name, sizes, which)
        return constant.permute(2, 0, 1) if constant.dim() == 3 else constant.t()

    def _in_turn(self, ids: Tensor) -> list[slice]:
        """The features that are computed together: all of them; or, so that all stays in the cache, one by one."""
        if self.fused or self.encoding.adaptive or ids.is_cuda or len(ids) * len(self.widths) <= IN_CACHE:
            return [slice(None)]
        return [slice(i, i + 1) for i in range(len(self.features))]

    def _rows(self, ids: Tensor, sizes: Sequence[int], which: slice) -> Tensor:
        """The rows [N, K] of some of the features."""
        same = len(set(sizes)) == 1
        shaped = ids.view(len(sizes), sizes[0], 1) if same else ids.unsqueeze(-1)
        constants = {name: self._spread(name, sizes, which) for name in self.names}
        rows = self.compute(shaped, constants | self.arrays)
        self._observe(ids)
        return rows.flatten(0, 1) if same else rows

    def _observe(self, ids: Tensor) -> None:
        """Lets an adaptive encoding take note of ids."""
        if self.training and self.encoding.adaptive:
            with torch.no_grad():
                self.encoding.observe(self.everyones(ids), self.arrays)

    def placed(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """int64 [N, K]: rows [N, K] of the parts' tables as rows of the lookup's matrices."""
        bases = self._spread("bases", sizes, slice(None))
        if bases.dim() == 2:
            return rows + bases
        return (rows.view(len(sizes), sizes[0], rows.shape[1]) + bases).flatten(0, 1)

    def are_numbers(self, cut: Cut) -> bool:
        """Whether every id of a batch lies in [0, cardinality)."""
        ends = zip(self.features, map(cut.extremes.__getitem__, self.places), strict=True)
        return all(least >= 0 and most < feature.num_ids for feature, (least, most) in ends)

    def check(self, cut: Cut) -> None:
        """Makes sure that the encoding takes the ids of a batch.

        Raises:
            UserError: when an id is out of range; it names feature, id and cardinality.
        """
        if self.encoding.num_ids is None:  # nor has any other of the block
            return
        for place, feature, limit in zip(self.places, self.features, self.limits, strict=True):
            least, most = cut.extremes[place]
            if limit is not None and (least < 0 or most >= limit):
                ids = cut.ids_of([place])
                at = int(((ids < 0) | (ids >= limit)).nonzero()[0])
                raise UserError(
                    f"feature {feature.name!r} (table {feature.space!r}): id {int(ids[at])} at position {at} "
                    f"of its values is outside [0, {feature.num_ids}); map unseen ids to 0 while preparing the data, "
                    "or plan this feature with a method that hashes"
                )

    def requests(
        self, rows: Tensor, sizes: Sequence[int], lengths: Tensor | None, weights: Tensor | None
    ) -> list[Request]:
        """What the lookup is asked for, one request per part.

        Args:
            rows: from `rows`.
            sizes: how many ids each feature has.
            lengths: int64 [F * B] to pool bags, or None for a vector per id.
            weights: float [N], or None.
        """
        if not self.widths:
            return []
        shifted = self.placed(rows, sizes).t()
        if not self.encoding.may_skip:
            asked = zip(self.widths, shifted, self.slots, strict=True)
            return [Request(width, part, lengths, weights, slots, sizes) for width, part, slots in asked]
        # A part that is not there reads row 0 with weight 0: zeros out, and a zero gradient.
        there = rows.t() >= 0
        factors = there.float() if weights is None else there * weights
        kept = torch.where(there, shifted, 0)
        each = enumerate(zip(self.widths, self.slots, strict=True))
        return [Request(width, kept[k], lengths, factors[k], slots, sizes) for k, (width, slots) in each]

    def combine(self, rows: Tensor, answers: Iterator[Tensor], stride: int | None) -> Tensor:
        """Vectors [N, D]; or, where bags were pooled, [B, F, D].

        Args:
            rows: from `rows`.
            answers: of the lookup, in the order of the requests.
            stride: B where bags were pooled, else None.
        """
        parts = [next(answers) for _ in self.widths] if self.widths else [rows]
        if stride is not None:
            parts = [per_bag(part, len(self.places), stride) for part in parts]
        return self.encoding.combine(parts, self.arrays)

    def pool(self, vectors: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """[F * B, D]: (weighted) sums of vectors [N, D] over bags of lengths [F * B], of the vectors' type."""
        if weights is not None:
            vectors = vectors * weights.to(vectors.dtype).unsqueeze(-1)
        if len(vectors) == len(lengths) and bool((lengths == 1).all()):
            return vectors
        return torch.segment_reduce(vectors, "sum", lengths=lengths.long(), axis=0, unsafe=True)


@cache
def _compiled(method: type[Encoding]) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """A method's `rows` for batches of any size."""
    return torch.compile(method.rows, dynamic=True)


def make_blocks(plan: Plan, lookup: Lookup, arrays: Arrays) -> list[Block]:
    """Groups the plan's features into blocks, keeping their order within each."""
    grouped: dict[tuple, list[int]] = {}
    for place, feature in enumerate(plan.features):
        encoding = plan.encodings[feature.space]
        widths = tuple(plan.tables[name].width for name in encoding.tables)
        bounded = encoding.num_ids is not None
        alone = feature.space if encoding.arrays() else None
        grouped.setdefault((type(encoding), encoding.variant, widths, bounded, alone), []).append(place)
    blocks = []
    for (_, _, widths, _, _), places in grouped.items():
        members = [plan.features[place] for place in places]
        encodings = [plan.encodings[member.space] for member in members]
        bases = bases_of(plan, members, lookup.base)
        blocks.append(Block(places, members, encodings, widths, bases, arrays, lookup.everyones))
    return blocks


def bases_of(plan: Plan, features: Sequence[Feature], base: Mapping[str, int]) -> Tensor:
    """int64 [F, K]: the offset of the table of every part."""
    encodings = [plan.encodings[feature.space] for feature in features]
    return torch.tensor([[base[name] for name in encoding.tables] for encoding in encodings], dtype=torch.int64)


def per_bag(stacked: Tensor, features: int, stride: int) -> Tensor:
    """[F * B, W], feature after feature, seen as [B, F, W]."""
    return stacked.view(features, stride, stacked.shape[1]).transpose(0, 1)
