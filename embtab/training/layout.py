"""What the columns of behaviour sequences are: fields of a target, the same fields of its history, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embtab.datasets.histories import SPACES
from embtab.errors import UserError
from embtab.features import Feature
from embtab.models.events import Events, count, segment_sum

Vectors = Mapping[str, JaggedTensor]


@dataclass(frozen=True)
class Layout:
    """What the features of a dataset are: fields of the target and of its history, and everything else.

    A feature with pooling "none" is a field of the history, and the other feature of its id space the same field of
    the target.

    Attributes:
        targets: a feature per field; the position, where there is one, comes last.
        histories: the same fields of the history.
        others: the features that are neither.
    """

    targets: tuple[str, ...]
    histories: tuple[str, ...]
    others: tuple[Feature, ...]

    @classmethod
    def of(cls, features: Sequence[Feature]) -> Layout:
        """The layout of a plan's or a dataset's features.

        Raises:
            UserError: when there is no history, or one without exactly one target in its id space.
        """
        histories = [feature for feature in features if feature.pooling == "none"]
        if not histories:
            raise UserError("no feature has pooling 'none', so there is no history; see `embtab prepare sequences`")
        histories.sort(key=lambda feature: feature.space == SPACES["position"])
        targets = []
        for history in histories:
            found = [f.name for f in features if f.space == history.space and f.pooling != "none"]
            if len(found) != 1:
                raise UserError(
                    f"history {history.name!r} needs one target feature of its id space {history.space!r}, "
                    f"found {len(found)}"
                )
            targets += found
        named = {*targets, *(history.name for history in histories)}
        others = tuple(feature for feature in features if feature.name not in named)
        return cls(tuple(targets), tuple(history.name for history in histories), others)

    @property
    def events(self) -> tuple[str, ...]:
        """The features that describe target and history."""
        return self.targets + self.histories

    def longest(self, sparse: KeyedJaggedTensor) -> int:
        """Events of the longest history of a batch.

        Raises:
            UserError: when the fields of a history differ in length, or a target has not one id per row.
        """
        lengths = sparse[self.histories[0]].lengths()
        for name in self.histories[1:]:
            if not torch.equal(sparse[name].lengths(), lengths):
                raise UserError(f"history {name!r} and {self.histories[0]!r} differ in length; prepare the data again")
        for name in self.targets:
            if bool((sparse[name].lengths() != 1).any()):
                raise UserError(f"target {name!r} must have one id in every row")
        return int(lengths.max()) if len(lengths) else 0

    def narrowed(self, sparse: KeyedJaggedTensor, kept: Tensor) -> KeyedJaggedTensor:
        """The batch with only some events in its histories: those of a bool [N] mask."""
        values, lengths = [], []
        names = sparse.keys()
        for name in names:
            column = sparse[name]
            is_history = name in self.histories
            values.append(column.values()[kept] if is_history else column.values())
            lengths.append(count(kept, column.lengths().long()) if is_history else column.lengths().long())
        return KeyedJaggedTensor(names, torch.cat(values), lengths=torch.cat(lengths))

    def gathered(self, vectors: Vectors) -> Events:
        """Targets and histories out of a collection's answer."""
        return Events(
            torch.stack([vectors[name].values() for name in self.targets], dim=1),
            torch.stack([vectors[name].values() for name in self.histories], dim=1),
            vectors[self.histories[0]].lengths().long(),
        )

    def pooled(self, vectors: Vectors) -> Tensor:
        """Float [B, C, D]: the vectors of the other features, pooled as each of them says."""
        if not self.others:
            target = vectors[self.targets[0]].values()
            return target.new_empty(len(target), 0, target.shape[1])
        return torch.stack([_pooled(feature, vectors[feature.name]) for feature in self.others], dim=1)


def _pooled(feature: Feature, bags: JaggedTensor) -> Tensor:
    lengths = bags.lengths().long()
    sums = segment_sum(bags.values(), lengths)
    return sums / lengths.clamp(min=1).unsqueeze(1) if feature.pooling == "mean" else sums
