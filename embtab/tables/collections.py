"""Embedding collections: a KeyedJaggedTensor of ids in, vectors out; drop-in for the torchrec classes of these names.

The one path, from ids to vectors:

    ids [N] --rows()--> rows [N, K] --lookup--> parts [N, K, W] --combine()--> vectors [N, D] --pool()--> output [B, D]

    N ids of a block   F features of a block   B bags per feature   K parts per id   W width of a part   D dimension

Features whose encodings differ only in constants form a block, computed in one go however many features it has. Where
`combine` is linear the order of the last two arrows is swapped: parts are pooled by the lookup, and combine runs on B
vectors instead of N. Where it is not (a product), each id is combined before bags are pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.lookup.base import Request
from embtab.methods.base import Encoding
from embtab.tables.base import Collection
from embtab.tables.batch import Cut
from embtab.tables.dispatch import JoinedRows, PerDistinctId, Way, joins, once, ways_of
from embtab.tables.opaque import traced_vectors


@dataclass(frozen=True)
class Asked:
    """How the vectors of a batch are computed.

    Attributes:
        cut: the batch.
        ways: its features', together.
        requests: what the lookup is asked for them, in order.
    """

    cut: Cut
    ways: list[Way]
    requests: list[Request]


class EmbeddingBagCollection(Collection):
    """Pooled vectors: KeyedJaggedTensor -> KeyedTensor with one vector of `plan.dim` per feature, in plan order.

    Bags may hold any number of ids, repeated or none at all (a zero vector). Weights of the KeyedJaggedTensor multiply
    the ids' vectors; "mean" divides the sum by the number of ids.

    Args:
        plan: how each feature is encoded.
        backend: "fbgemm" trains the tables inside backward by `optimizer`; "native" too, by a loop that is compiled on
            first use, for CPUs; "torch" makes them ordinary parameters.
        optimizer: not for the torch backend; row-wise Adagrad with lr 0.05 if None.
        init_std: standard deviation of the entries of composed vectors; None draws nothing, for tables whose values are
            loaded next.
        device: where the tables live; "meta" for tables that are larger than one process's memory: they take none
            until `TorchRecStrategy` spreads them, and each process draws its own part.

    Raises:
        UserError: for an unknown backend or device, an optimizer with the torch backend, a feature with pooling "none",
            or what is no plan or no optimizer.
    """

    prepared: tuple[KeyedJaggedTensor, Asked, Sequence[Request]] | None = None
    """What a pipeline has worked out of a batch before its turn, see `embtab.sharding.pipeline`."""

    def check_features(self, features: Sequence[Feature]) -> None:
        """Refuses features that are not pooled."""
        for feature in features:
            if feature.pooling == "none":
                raise UserError(f"feature {feature.name!r} has pooling 'none'; use EmbeddingCollection, or sum or mean")

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """One vector per feature and bag.

        Args:
            features: ids of at least the plan's features; keys may come in any order.

        Raises:
            UserError: when a feature is missing or an id is out of range.
        """
        vectors = self.vectors(features)
        return KeyedTensor(self.names, [self.plan.dim] * len(self.names), vectors.flatten(1))

    def vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """The same as [B, F, D], features in plan order."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return traced_vectors(self, self.number, features)
        self._remind()
        if self.prepared is not None and self.prepared[0] is features:
            (_, asked, requests), self.prepared = self.prepared, None
        else:
            asked = self.asked(features)
            requests = asked.requests
        answers = iter(self.lookup(requests))
        found = [(way.places, way.vectors(answers)) for way in asked.ways]
        return self._divided(_in_plan_order(found), asked.cut)

    def asked(self, features: KeyedJaggedTensor) -> Asked:
        """How a batch is computed, and what the lookup is asked for that."""
        cut = Cut(features, self.names)
        ways = ways_of(cut, list(self._each_block()), self.pools, self.lookup)
        return Asked(cut, ways, [request for way in ways for request in way.requests])

    def _divided(self, sums: Tensor, cut: Cut) -> Tensor:
        """Sums [B, F, D] divided by bag lengths where a feature pools by mean; empty bags stay zero."""
        if not self.has_mean or cut.bag == 1:
            return sums
        counts = cut.lengths.view(len(self.names), cut.stride).t().clamp(min=1)
        return sums / torch.where(self.get_buffer("means"), counts, 1).unsqueeze(-1)

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


class EmbeddingCollection(Collection):
    """A vector per id: KeyedJaggedTensor -> dict of JaggedTensor with values [N, D] and the ids' own lengths.

    Takes the same arguments as `EmbeddingBagCollection`; pooling of the features is left to the model.
    """

    def pools(self, encoding: Encoding) -> bool:
        """Never: the model asks for every id."""
        return False

    @torch.compiler.disable(reason="how many vectors a feature gets depends on the batch; leave fullgraph=True out")
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The vectors of every feature's ids, in their order.

        Raises:
            UserError: when a feature is missing or an id is out of range.
        """
        self._remind()
        cut, blocks = Cut(features, self.names), list(self._each_block())
        for block in blocks:
            block.check(cut)
        ways: list[JoinedRows | PerDistinctId] = []
        ways += [JoinedRows([block], cut, self.lookup, pooled=False) for block in blocks if joins(self.lookup, block)]
        rest = [block for block in blocks if not joins(self.lookup, block)]
        if able := [block for block in once(cut, rest, self.lookup) if not block.encoding.bare]:
            # Each on its own: where some blocks' vectors are float32 and others' what autocast makes, they stay so.
            ways += [PerDistinctId([block], cut, pooled=False) for block in able]
            rest = [block for block in rest if block not in able]
        requests = [request for way in ways for request in way.requests]
        all_rows = []
        for block in rest:
            sizes = cut.sizes_of(block.places)
            all_rows.append(block.rows(cut.ids_of(block.places), sizes))
            requests += block.requests(all_rows[-1], sizes, None, None)
        answers = iter(self.lookup(requests))
        found = [(way.places, way.each(answers)) for way in ways]
        each = zip(rest, all_rows, strict=True)
        found += [(block.places, block.combine(rows, answers, None)) for block, rows in each]
        outputs = {place: values for places, vectors in found for place, values in self._cut(vectors, places, cut)}
        return {name: outputs[place] for place, name in enumerate(self.names)}

    @staticmethod
    def _cut(vectors: Tensor, places: list[int], cut: Cut) -> Iterator[tuple[int, JaggedTensor]]:
        """Vectors [N, D] of some features, feature by feature."""
        counts = cut.lengths_of(places).view(len(places), cut.stride)
        for place, values, lengths in zip(places, vectors.split(cut.sizes_of(places)), counts, strict=True):
            yield place, JaggedTensor(values=values, lengths=lengths)

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


def _in_plan_order(found: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """[B, F, D] from [B, some of F, D] with the places of these features."""
    if len(found) == 1:
        return found[0][1]
    places = [place for some, _ in found for place in some]
    if places == sorted(places):
        return torch.cat([vectors for _, vectors in found], dim=1)
    by_place = dict(zip(places, (vector for _, vectors in found for vector in vectors.unbind(1)), strict=True))
    return torch.stack([by_place[place] for place in range(len(places))], dim=1)
