"""Blocks: features that are computed together, the arrays their encodings have, and how a batch is cut up for them.

N ids of a block   F features of a block   B bags per feature   K parts per id   W width of a part   D dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.lookup import Request, slot
from embtab.methods import Encoding
from embtab.planning import Plan
from embtab.state import NamedState


class Arrays(NamedState):
    """The arrays that encodings have beside their tables: trained ones are parameters, integer ones are buffers."""

    def __init__(self, encodings: Mapping[str, Encoding], device: torch.device | str) -> None:
        super().__init__()
        self.places: dict[tuple[str, str], str] = {}
        self.saved: dict[bool, dict[str, str]] = {True: {}, False: {}}
        for space, encoding in encodings.items():
            for name, array in encoding.arrays().items():
                place = f"array{len(self.places)}"
                self.places[space, name] = place
                self.saved[array.serving][f"{space}.{name}" if array.serving else f"{space}.{name}.training"] = place
                value = torch.zeros(array.shape, dtype=getattr(torch, array.dtype), device=device)
                if array.dtype == "float32":
                    self.register_parameter(place, nn.Parameter(value))
                else:
                    self.register_buffer(place, value)

    def of(self, space: str) -> dict[str, Tensor]:
        """The arrays of one id space, by name."""
        return {name: getattr(self, place) for (owner, name), place in self.places.items() if owner == space}

    def named_state(self) -> dict[str, Tensor]:
        """The arrays that serving needs, as "space.name"."""
        return {name: getattr(self, place).detach() for name, place in self.saved[True].items()}

    def optional_state(self) -> dict[str, Tensor]:
        """The arrays that only training needs, as "space.name.training"; without them, counting starts anew."""
        return {name: getattr(self, place) for name, place in self.saved[False].items()}

    def is_optional(self, name: str) -> bool:
        """Whether it is an array that only training needs."""
        return name in self.saved[False]


class Block(nn.Module):
    """Features whose encodings differ only in constants; or, where an encoding has arrays, the features of one space.

    Args:
        features: F features, in the order of the plan.
        encodings: the encoding of each.
        widths: the widths of the K parts.
        bases: int64 [F, K], the offset of each part's table in the lookup's matrix.
        arrays: the arrays of all encodings.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        encodings: Sequence[Encoding],
        widths: Sequence[int],
        bases: Tensor,
        arrays: Arrays,
    ) -> None:
        super().__init__()
        self.all_arrays = [arrays]  # in a list, so that they stay the collection's
        self.everyones: Callable[[Tensor], Tensor] = _own  # see Lookup.everyones
        self.features = list(features)
        self.encoding = encodings[0]
        self.widths = list(widths)
        self.slots = [[slot(feature.name, k) for feature in features] for k in range(len(self.widths))]
        self.bounded = self.encoding.num_ids is not None
        self.has_mean = any(feature.pooling == "mean" for feature in features)
        constants = [encoding.constants() for encoding in encodings]
        self.names = list(constants[0])
        self._buffer("bases", bases)
        self._buffer("limits", torch.tensor([[encoding.num_ids or 0] for encoding in encodings]))
        self._buffer("cardinalities", torch.tensor([feature.num_ids for feature in features]))
        self._buffer("means", torch.tensor([feature.pooling == "mean" for feature in features]))
        for name in self.names:
            self._buffer(name, torch.tensor([each[name] for each in constants]))

    def _buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(f"{name}_", value, persistent=False)

    def set_bases(self, bases: Tensor) -> None:
        """Changes the offsets of the parts' tables: int64 [F, K]."""
        self.get_buffer("bases_").copy_(bases)

    def _spread(self, name: str, sizes: Sequence[int]) -> Tensor:
        """A constant [F, K] for ids laid out feature after feature: [F, 1, K] for equal sizes, else [N, K]."""
        constant = self.get_buffer(f"{name}_")
        if len(set(sizes)) == 1:
            return constant.unsqueeze(1)
        return constant.repeat_interleave(torch.tensor(sizes, device=constant.device), dim=0, output_size=sum(sizes))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the block's encoding, by name."""
        return self.all_arrays[0].of(self.features[0].space) if self.encoding.arrays() else {}

    @property
    def cardinalities(self) -> Tensor:
        """int64 [F]: the number of ids of each feature."""
        return self.get_buffer("cardinalities_")

    def rows(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """int64 [N, K] (or [F, N / F, K], for equal sizes): rows of every part; -1 where an id does not have it.

        In training mode an adaptive encoding takes note of the ids.

        Args:
            ids: int64 [N], feature after feature.
            sizes: how many ids each feature has.

        Raises:
            UserError: when an id is out of range; it names feature, id and cardinality.
        """
        self._check(ids, sizes)
        shaped = ids.view(len(sizes), sizes[0], 1) if len(set(sizes)) == 1 else ids.unsqueeze(-1)
        constants = {name: self._spread(name, sizes) for name in self.names}
        return self._noted(ids, self.encoding.rows(shaped, constants | self.arrays))

    def rows_of_rows(self, ids: Tensor, stride: int) -> Tensor:
        """int64 [B, F, K]: rows in the lookup's matrix, in the order in which a model reads the features.

        Args:
            ids: int64 [F * B], feature after feature; otherwise as `rows`.
            stride: B.
        """
        features = len(self.features)
        self._check(ids, [stride] * features)
        shaped = ids.view(features, stride).t().contiguous().unsqueeze(-1)
        constants = {name: self.get_buffer(f"{name}_") for name in self.names}
        rows = self.encoding.rows(shaped, constants | self.arrays)
        return self._noted(ids, rows + self.get_buffer("bases_"))

    def _noted(self, ids: Tensor, rows: Tensor) -> Tensor:
        if self.training and self.encoding.adaptive:
            with torch.no_grad():
                self.encoding.observe(self.everyones(ids), self.arrays)
        return rows

    def are_numbers(self, ids: Tensor, sizes: Sequence[int]) -> bool:
        """Whether every id lies in [0, cardinality)."""
        return not self._outside(ids, sizes, self.cardinalities)

    def _check(self, ids: Tensor, sizes: Sequence[int]) -> None:
        if self.bounded and self._outside(ids, sizes, self.get_buffer("limits_")[:, 0]):
            limits = self.get_buffer("limits_")[:, 0].repeat_interleave(torch.tensor(sizes, device=ids.device))
            self._complain(ids, (ids < 0) | (ids >= limits), sizes)

    def _outside(self, ids: Tensor, sizes: Sequence[int], limits: Tensor) -> bool:
        """Whether an id lies outside [0, limit); limits are int64 [F]."""
        if len(ids) == 0:
            return False
        if len(set(sizes)) == 1:
            least, most = ids.view(len(sizes), -1).aminmax(dim=1)
        else:
            ends = [part.aminmax() for part in ids.split(list(sizes)) if len(part)]
            least, most = (torch.stack(each) for each in zip(*ends, strict=True))
            limits = limits[[i for i, size in enumerate(sizes) if size]]
        return bool(((least < 0) | (most >= limits)).any())

    def requests(
        self, rows: Tensor, sizes: Sequence[int], lengths: Tensor | None, weights: Tensor | None
    ) -> list[Request]:
        """What the lookup is asked for, one request per part.

        Args:
            rows: from `rows`.
            sizes: how many ids each feature has.
            lengths: int64 [F * B] to pool bags, or None for a vector per id.
            weights: float32 [N], or None.
        """
        if not self.widths:
            return []
        shifted = _parts(rows + self._spread("bases", sizes))
        if not self.encoding.may_skip:
            asked = zip(self.widths, shifted, self.slots, strict=True)
            return [Request(width, part, lengths, weights, slots, sizes) for width, part, slots in asked]
        # A part that is not there reads row 0 with weight 0: zeros out, and a zero gradient.
        there = _parts(rows) >= 0
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
        parts = [next(answers) for _ in self.widths] if self.widths else [_parts(rows).t()]
        if stride is not None:
            parts = [per_bag(part, stride) for part in parts]
        return self.encoding.combine(parts, self.arrays)

    def _complain(self, ids: Tensor, outside: Tensor, sizes: Sequence[int]) -> None:
        at = int(outside.nonzero()[0])
        for feature, size in zip(self.features, sizes, strict=True):
            if at < size:
                raise UserError(
                    f"feature {feature.name!r} (table {feature.space!r}): id {int(ids[outside][0])} at position {at} "
                    f"of its values is outside [0, {feature.num_ids}); map unseen ids to 0 while preparing the data, "
                    "or plan this feature with a method that hashes"
                )
            at -= size

    def pool(self, vectors: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """[F * B, D]: (weighted) sums of vectors [N, D] over bags of lengths [F * B]."""
        if weights is not None:
            vectors = vectors * weights.unsqueeze(-1)
        if len(vectors) == len(lengths) and bool((lengths == 1).all()):
            return vectors
        return torch.segment_reduce(vectors, "sum", lengths=lengths.long(), axis=0, unsafe=True)

    def divide(self, sums: Tensor, lengths: Tensor) -> Tensor:
        """[B, F, D]: sums divided by bag lengths [F * B] where a feature pools by mean; empty bags stay zero."""
        if not self.has_mean:
            return sums
        counts = lengths.view(len(self.features), -1).t().clamp(min=1)
        return sums / torch.where(self.get_buffer("means_"), counts, 1).unsqueeze(-1)


def make_blocks(plan: Plan, base: Mapping[str, int], arrays: Arrays) -> list[Block]:
    """Groups the plan's features into blocks, keeping their order within each."""
    grouped: dict[tuple, list[Feature]] = {}
    for feature in plan.features:
        encoding = plan.encodings[feature.space]
        widths = tuple(plan.tables[name].width for name in encoding.tables)
        bounded = encoding.num_ids is not None
        alone = feature.space if encoding.arrays() else None
        grouped.setdefault((type(encoding), encoding.variant, widths, bounded, alone), []).append(feature)
    blocks = []
    for (_, _, widths, _, _), members in grouped.items():
        encodings = [plan.encodings[member.space] for member in members]
        blocks.append(Block(members, encodings, widths, bases_of(plan, members, base), arrays))
    return blocks


def bases_of(plan: Plan, features: Sequence[Feature], base: Mapping[str, int]) -> Tensor:
    """int64 [F, K]: the offset of the table of every part."""
    encodings = [plan.encodings[feature.space] for feature in features]
    return torch.tensor([[base[name] for name in encoding.tables] for encoding in encodings], dtype=torch.int64)


def _own(ids: Tensor) -> Tensor:
    return ids


def _parts(rows: Tensor) -> Tensor:
    """[K, N] from [N, K] or [F, N / F, K]."""
    return rows.flatten(0, -2).t()


def per_bag(stacked: Tensor, stride: int) -> Tensor:
    """[F * B, W], feature after feature, seen as [B, F, W]."""
    return stacked.view(-1 if stride else 0, stride, stacked.shape[1]).transpose(0, 1)


Piece = tuple[Block, Tensor, Tensor, Tensor | None, list[int]]


def pieces_of(batch: KeyedJaggedTensor, blocks: Iterator[Block]) -> Iterator[Piece]:
    """Each block with its ids [N], bag lengths [F * B], weights [N] and the number of ids of each feature."""
    values, lengths, weights = batch.values().long(), batch.lengths(), batch.weights_or_none()
    ends = batch.offset_per_key()
    sizes = [stop - start for start, stop in pairwise(ends)]
    first = 0
    for block in blocks:
        last = first + len(block.features)
        ids = slice(ends[first], ends[last])
        bags = slice(first * batch.stride(), last * batch.stride())
        yield block, values[ids], lengths[bags], None if weights is None else weights[ids], sizes[first:last]
        first = last
