"""A batch cut up by feature: whichever features are computed together get their ids one after the other.

F features   B bags per feature   N ids of the features
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.errors import UserError


class Cut:
    """A batch, from which features are taken by their places in the plan, whatever the order of its keys.

    Args:
        batch: ids of at least the plan's features.
        names: of the plan's features.

    Raises:
        UserError: when a feature is missing or stands twice, features have different numbers of bags, ids are no
            integers, or lengths, offsets or weights do not fit the ids.
    """

    def __init__(self, batch: KeyedJaggedTensor, names: Sequence[str]) -> None:
        check_form(batch)
        keys = {key: i for i, key in enumerate(batch.keys())}
        for name in names:
            if name not in keys:
                raise UserError(f"feature {name!r} of the plan is not in the batch; it has {', '.join(keys)}")
        _check_unique(batch.keys())
        self.stride: int = batch.stride()
        self.weighted = batch.weights_or_none() is not None
        self._keys = [keys[name] for name in names]
        self._values, self._lengths, self._weights = _ids(batch.values()), batch.lengths(), batch.weights_or_none()
        if len(self._lengths) != len(keys) * self.stride:
            raise UserError(
                f"the batch has {len(self._lengths)} lengths of bags, which are not {len(keys)} keys' alike"
            )
        self._ends: list[int] = batch.offset_per_key()
        self._check_lengths(names)
        if self._weights is not None and self._weights.shape != self._values.shape:
            raise UserError(
                f"the batch has {len(self._weights)} weights for {len(self._values)} ids; one for each is needed"
            )

    @cached_property
    def ids(self) -> Tensor:
        """int64 [N]: those of all features, in plan order."""
        return self.ids_of(range(len(self._keys)))

    @cached_property
    def lengths(self) -> Tensor:
        """Int [F * B]: those of all bags, features in plan order."""
        return self.lengths_of(range(len(self._keys)))

    @cached_property
    def bag(self) -> int | None:
        """The number of ids in every bag, if it is the same for all of them and above zero."""
        bag, rest = divmod(len(self.ids), len(self.lengths)) if len(self.lengths) else (0, 1)
        if rest or not bag:
            return None
        least, most = self._least_and_most
        return bag if least == most else None

    @cached_property
    def _least_and_most(self) -> tuple[int, int]:
        """The lengths of the shortest and of the longest bag; 0 and 0 where there is none."""
        if not len(self.lengths):
            return 0, 0
        least, most = torch.stack(self.lengths.aminmax()).tolist()
        return least, most

    @cached_property
    def sizes(self) -> list[int]:
        """Ids of each feature, in plan order."""
        return [self._ends[key + 1] - self._ends[key] for key in self._keys]

    @cached_property
    def extremes(self) -> list[tuple[int, int]]:
        """The least and the largest id of each feature, in plan order; (0, -1) where it has none."""
        if len(set(self.sizes)) == 1 and self.sizes[0]:
            least, most = self.ids.view(len(self.sizes), -1).aminmax(dim=1)
        else:
            nothing = self.ids.new_tensor([0, -1])
            ends = [part.aminmax() if len(part) else nothing for part in self.ids.split(self.sizes)]
            least, most = (torch.stack(each) for each in zip(*ends, strict=True))
        return list(zip(least.tolist(), most.tolist(), strict=True))

    def _check_lengths(self, names: Sequence[str]) -> None:
        """Makes sure that bags hold all ids between them.

        Raises:
            UserError: when they do not.
        """
        if self._least_and_most[0] < 0:
            at = int((self.lengths < 0).nonzero()[0])
            raise UserError(
                f"feature {names[at // self.stride]!r}: bag {at % self.stride} has the length {int(self.lengths[at])}; "
                "offsets must not fall, and lengths not be negative"
            )
        if self._ends[-1] != len(self._values) or self._ends != sorted(self._ends):
            raise UserError(
                f"the batch has bags of {self._ends[-1]} ids together, and {len(self._values)} ids; lengths must add "
                "up to the number of ids, and offsets rise from 0 to it"
            )

    def ids_of(self, places: Sequence[int]) -> Tensor:
        """int64 [N]: the ids of the features at these places of the plan, feature after feature."""
        return self._taken(self._values, self._ends, places)

    def lengths_of(self, places: Sequence[int]) -> Tensor:
        """Int [F * B]: how many ids each of their bags has."""
        return self._taken(self._lengths, None, places)

    def weights_of(self, places: Sequence[int]) -> Tensor | None:
        """Float [N]: the factors of their ids' vectors, or None."""
        return None if self._weights is None else self._taken(self._weights, self._ends, places)

    def sizes_of(self, places: Sequence[int]) -> list[int]:
        """How many ids each of them has."""
        return [self.sizes[place] for place in places]

    def _taken(self, values: Tensor, ends: Sequence[int] | None, places: Sequence[int]) -> Tensor:
        """What features have of some values: B each, or as many as `ends` say."""
        at = (lambda key: key * self.stride) if ends is None else ends.__getitem__
        runs = _runs(tuple([self._keys[place] for place in places]))
        parts = [values[at(first) : at(stop)] for first, stop in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_form(batch: KeyedJaggedTensor) -> None:
    """Raises UserError for a batch whose features have different numbers of bags."""
    if batch.variable_stride_per_key() or batch.inverse_indices_or_none() is not None:
        raise UserError(
            "batches whose features have different numbers of bags (a stride per key, inverse_indices) are not "
            "supported; give every feature a bag for every row"
        )


def _check_unique(keys: Sequence[str]) -> None:
    """Raises UserError for a key that stands twice, of which one alone would be read."""
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise UserError(f"key {twice!r} stands twice in the batch; keys must be unique")


def _ids(values: Tensor) -> Tensor:
    """int64 [N], from integers of any width.

    Raises:
        UserError: when they are no integers, of which some would be read as other ids.
    """
    kind = values.dtype
    if values.numel() and (kind.is_floating_point or kind.is_complex or kind == torch.bool):
        raise UserError(f"the batch's ids are {str(kind).removeprefix('torch.')}; they must be integers, such as int64")
    return values.long()


@lru_cache(1024)
def _runs(keys: tuple[int, ...]) -> list[tuple[int, int]]:
    """Keys as ranges [first, stop) of neighbours; batch after batch has the same."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(keys)) if b != a + 1), len(keys)]
    return [(keys[a], keys[b - 1] + 1) for a, b in pairwise(starts)]
