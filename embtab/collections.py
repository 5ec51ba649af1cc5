"""Embedding collections: a KeyedJaggedTensor of ids in, vectors out; drop-in for the torchrec classes of these names.

The one path from ids to vectors:

    ids [N] --rows()--> rows [N, K] --lookup--> parts [N, K, W] --combine()--> vectors [N, D] --pool()--> output [B, D]

    N ids of a block   F features of a block   B bags per feature   K parts per id   W width of a part   D dimension

Features whose encodings differ only in constants form a block, computed in one go however many features it has. Where
`combine` is linear the order of the last two arrows is swapped: parts are pooled by the lookup, and combine runs on B
vectors instead of N. Where it is not (a product), each id is combined before bags are pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import seed_of
from embtab.lookup import Lookup, Optimizer, Request, make_lookup, slot
from embtab.methods import Encoding
from embtab.methods.base import LiveTable
from embtab.planning import Plan
from embtab.quantise import served
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

    def rows(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """int64 [N, K] (or [F, N / F, K], for equal sizes): rows of every part; -1 where an id does not have it.

        In training mode an adaptive encoding takes note of the ids.

        Args:
            ids: int64 [N], feature after feature.
            sizes: how many ids each feature has.

        Raises:
            UserError: when an id is out of range; it names feature, id and cardinality.
        """
        shaped = ids.view(len(sizes), sizes[0], 1) if len(set(sizes)) == 1 else ids.unsqueeze(-1)
        if self.bounded:
            limits = self._spread("limits", sizes)
            outside = (shaped < 0) | (shaped >= limits)
            if bool(outside.any()):
                self._complain(ids, outside.flatten(), sizes)
        constants = {name: self._spread(name, sizes) for name in self.names}
        rows: Tensor = self.encoding.rows(shaped, constants | self.arrays)
        if self.training and self.encoding.adaptive:
            with torch.no_grad():
                self.encoding.observe(ids, self.arrays)
        return rows

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
            parts = [_per_bag(part, stride) for part in parts]
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


class _Collection(nn.Module):
    """What both collections share: the plan, the lookup backend and the blocks of features."""

    def __init__(
        self,
        plan: Plan,
        backend: str = "fbgemm",
        optimizer: Optimizer | None = None,
        init_std: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.plan = plan
        self.lookup = make_lookup(list(plan.tables.values()), backend, device, optimizer)
        self.arrays = Arrays(plan.encodings, device)
        self.blocks = nn.ModuleList(_blocks(plan, self.lookup.base, self.arrays)).to(device)
        self.order = [feature.name for block in self._each_block() for feature in block.features]
        self.init(init_std)

    def _each_block(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @torch.no_grad()
    def init(self, std: float) -> None:
        """Draws every table anew: zero mean, and composed vectors of standard deviation `std` whatever the method."""
        for space, encoding in self.plan.encodings.items():
            for name, start in zip(encoding.tables, encoding.start(std), strict=True):
                self.lookup.table(name).normal_(start.mean, start.std)
            specs = encoding.arrays()
            for name, array in self.arrays.of(space).items():
                if specs[name].dtype == "float32":
                    array.normal_(specs[name].mean, specs[name].std * (std if specs[name].relative else 1))
                else:
                    generator = np.random.default_rng(abs(seed_of(space, 0, self.plan.seed)))
                    array.copy_(torch.from_numpy(encoding.initial(name, generator)))

    @torch.no_grad()
    def adapt(self, step: int, epoch: int | None = None) -> list[str]:
        """Lets methods that reorganise themselves do so, where they say that it is time; to be called before a step.

        What they do depends on the tables, the ids seen in training mode, the plan's seed and `step`, and on nothing
        else, so a run that is resumed from a state dict goes on as if it had not stopped. The methods also move what
        the fused optimizer remembers; what an optimizer of the torch backend remembers of a row stays with the row.

        Args:
            step: batches trained so far; nothing happens before the first.
            epoch: epochs trained so far, where the coming batch is the first of an epoch; else None.

        Returns:
            The id spaces that were reorganised.
        """
        due = {space: e for space, e in self.plan.encodings.items() if e.adaptive and step > 0 and e.due(step, epoch)}
        moments = self.lookup.optimizer_state() if due else {}
        for space, encoding in due.items():
            tables = {name: LiveTable(self.lookup.table(name), moments.get(name)) for name in encoding.tables}
            generator = np.random.default_rng([abs(seed_of(space, 0, self.plan.seed)), step])
            encoding.adapt(tables, self.arrays.of(space), generator)
        return list(due)

    @torch.no_grad()
    def round_to_served(self) -> None:
        """Replaces every row by the value that serving will read in the plan's precision; after it, stop training.

        Raises:
            UserError: when a table holds an entry that cannot be stored in its precision; it names the table.
        """
        for name, table in self.plan.tables.items():
            rows = self.lookup.table(name)
            try:
                rows.copy_(served(rows, table.precision))
            except ValueError as error:
                raise UserError(f"table {name!r} cannot be served in {table.precision}: {error}") from None

    def set_learning_rate(self, lr: float) -> None:
        """Changes the table optimizer's learning rate; not for the torch backend, whose optimizer is outside.

        Raises:
            UserError: for the torch backend.
        """
        self.lookup.set_learning_rate(lr)

    def pools(self, encoding: Encoding) -> bool:
        """Whether the lookup sums bags of an encoding's parts, or is asked for the parts of every id."""
        return encoding.linear

    def replace_lookup(self, lookup: Lookup) -> None:
        """Puts another lookup in place of the collection's, with the same tables, and the same values in them."""
        lookup.load_state_dict(self.lookup.state_dict())
        self.lookup = lookup
        for block in self._each_block():
            block.set_bases(_bases(self.plan, block.features, lookup.base))

    def _arranged(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The plan's features, in block order."""
        if features.variable_stride_per_key():
            raise UserError("batches whose features have different numbers of bags are not supported")
        keys = features.keys()
        if keys == self.order:
            return features
        at = {key: i for i, key in enumerate(keys)}
        for name in self.order:
            if name not in at:
                raise UserError(f"feature {name!r} of the plan is not in the batch; it has {', '.join(keys)}")
        return features.permute([at[name] for name in self.order])

    def extra_repr(self) -> str:
        """The methods in use."""
        return ", ".join(sorted({encoding.method for encoding in self.plan.encodings.values()}))


class EmbeddingBagCollection(_Collection):
    """Pooled vectors: KeyedJaggedTensor -> KeyedTensor with one vector of `plan.dim` per feature, in plan order.

    Bags may hold any number of ids, repeated or none at all (a zero vector). Weights of the KeyedJaggedTensor multiply
    the ids' vectors; "mean" divides the sum by the number of ids.

    Args:
        plan: how each feature is encoded.
        backend: "fbgemm" trains the tables inside backward by `optimizer`; "torch" makes them ordinary parameters.
        optimizer: for the fbgemm backend; row-wise Adagrad with lr 0.05 if None.
        init_std: standard deviation of the entries of composed vectors.
        device: where the tables live.

    Raises:
        UserError: for an unknown backend, an optimizer with the torch backend, or a feature with pooling "none".
    """

    def __init__(
        self,
        plan: Plan,
        backend: str = "fbgemm",
        optimizer: Optimizer | None = None,
        init_std: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        for feature in plan.features:
            if feature.pooling == "none":
                raise UserError(f"feature {feature.name!r} has pooling 'none'; use EmbeddingCollection, or sum or mean")
        super().__init__(plan, backend, optimizer, init_std, device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """One vector per feature and bag.

        Args:
            features: ids of at least the plan's features; keys may come in any order.

        Raises:
            UserError: when a feature is missing or an id is out of range.
        """
        names = [feature.name for feature in self.plan.features]
        vectors = self.vectors(features)
        return KeyedTensor(names, [self.plan.dim] * len(names), vectors.flatten(1))

    def vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """The same as [B, F, D], features in plan order."""
        batch = self._arranged(features)
        stride = batch.stride()
        pieces = list(_pieces(batch, self._each_block()))
        all_rows = [block.rows(ids, sizes) for block, ids, _, _, sizes in pieces]
        requests: list[Request] = []
        for (block, _, lengths, weights, sizes), rows in zip(pieces, all_rows, strict=True):
            pools = self.pools(block.encoding)
            requests += block.requests(rows, sizes, lengths if pools else None, weights if pools else None)
        answers = iter(self.lookup(requests))
        outputs: list[Tensor] = []
        for (block, _, lengths, weights, _), rows in zip(pieces, all_rows, strict=True):
            if self.pools(block.encoding):
                sums = block.combine(rows, answers, stride)
            else:
                sums = _per_bag(block.pool(block.combine(rows, answers, None), lengths, weights), stride)
            outputs.append(block.divide(sums, lengths))
        return self._in_plan_order(outputs)

    def _in_plan_order(self, outputs: Sequence[Tensor]) -> Tensor:
        """[B, F, D] from one such tensor per block."""
        names = [feature.name for feature in self.plan.features]
        if names == self.order:
            return outputs[0] if len(outputs) == 1 else torch.cat(tuple(outputs), dim=1)
        by_name = dict(zip(self.order, (vector for output in outputs for vector in output.unbind(1)), strict=True))
        return torch.stack([by_name[name] for name in names], dim=1)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables as torchrec describes them, for models that ask (torchrec.models.dlrm.DLRM does)."""
        kinds = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
        grouped: dict[tuple[str, str], list[Feature]] = {}
        for feature in self.plan.features:
            grouped.setdefault((feature.space, feature.pooling), []).append(feature)
        return [
            EmbeddingBagConfig(
                name=space,
                embedding_dim=self.plan.dim,
                num_embeddings=members[0].num_ids,
                feature_names=[member.name for member in members],
                pooling=kinds[pooling],
            )
            for (space, pooling), members in grouped.items()
        ]


class EmbeddingCollection(_Collection):
    """A vector per id: KeyedJaggedTensor -> dict of JaggedTensor with values [N, D] and the ids' own lengths.

    Takes the same arguments as `EmbeddingBagCollection`; pooling of the features is left to the model.
    """

    def pools(self, encoding: Encoding) -> bool:
        """Never: the model asks for every id."""
        return False

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The vectors of every feature's ids, in their order.

        Raises:
            UserError: when a feature is missing or an id is out of range.
        """
        batch = self._arranged(features)
        pieces = list(_pieces(batch, self._each_block()))
        all_rows = [block.rows(ids, sizes) for block, ids, _, _, sizes in pieces]
        requests: list[Request] = []
        for (block, _, _, _, sizes), rows in zip(pieces, all_rows, strict=True):
            requests += block.requests(rows, sizes, None, None)
        answers = iter(self.lookup(requests))
        outputs: dict[str, JaggedTensor] = {}
        for (block, _, lengths, _, sizes), rows in zip(pieces, all_rows, strict=True):
            vectors = block.combine(rows, answers, None)
            per_feature = lengths.view(len(sizes), -1)
            for feature, values, counts in zip(block.features, vectors.split(sizes), per_feature, strict=True):
                outputs[feature.name] = JaggedTensor(values=values, lengths=counts)
        return {feature.name: outputs[feature.name] for feature in self.plan.features}

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables as torchrec describes them."""
        spaces: dict[str, list[Feature]] = {}
        for feature in self.plan.features:
            spaces.setdefault(feature.space, []).append(feature)
        return [
            EmbeddingConfig(
                name=space,
                embedding_dim=self.plan.dim,
                num_embeddings=members[0].num_ids,
                feature_names=[member.name for member in members],
            )
            for space, members in spaces.items()
        ]


def _blocks(plan: Plan, base: Mapping[str, int], arrays: Arrays) -> list[Block]:
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
        blocks.append(Block(members, encodings, widths, _bases(plan, members, base), arrays))
    return blocks


def _bases(plan: Plan, features: Sequence[Feature], base: Mapping[str, int]) -> Tensor:
    """int64 [F, K]: the offset of the table of every part."""
    encodings = [plan.encodings[feature.space] for feature in features]
    return torch.tensor([[base[name] for name in encoding.tables] for encoding in encodings], dtype=torch.int64)


def _parts(rows: Tensor) -> Tensor:
    """[K, N] from [N, K] or [F, N / F, K]."""
    return rows.flatten(0, -2).t()


def _per_bag(stacked: Tensor, stride: int) -> Tensor:
    """[F * B, W], feature after feature, seen as [B, F, W]."""
    return stacked.view(-1 if stride else 0, stride, stacked.shape[1]).transpose(0, 1)


Piece = tuple[Block, Tensor, Tensor, Tensor | None, list[int]]


def _pieces(batch: KeyedJaggedTensor, blocks: Iterator[Block]) -> Iterator[Piece]:
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
