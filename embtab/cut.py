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
        UserError: when a feature is missing, or features have different numbers of bags.
    """

    def __init__(self, batch: KeyedJaggedTensor, names: Sequence[str]) -> None:
        if batch.variable_stride_per_key():
            raise UserError("batches whose features have different numbers of bags are not supported")
        keys = {key: i for i, key in enumerate(batch.keys())}
        for name in names:
            if name not in keys:
                raise UserError(f"feature {name!r} of the plan is not in the batch; it has {', '.join(keys)}")
        self.stride: int = batch.stride()
        self.weighted = batch.weights_or_none() is not None
        self._keys = [keys[name] for name in names]
        self._ends: list[int] = batch.offset_per_key()
        self._values, self._lengths, self._weights = batch.values().long(), batch.lengths(), batch.weights_or_none()

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
        least, most = self.lengths.aminmax()
        return bag if int(least) == int(most) else None

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

    def ids_of(self, places: Sequence[int]) -> Tensor:
        """int64 [N]: the ids of the features at these places of the plan, feature after feature."""
        return self._taken(self._values, self._ends, places)

    def lengths_of(self, places: Sequence[int]) -> Tensor:
        """Int [F * B]: how many ids each of their bags has."""
        return self._taken(self._lengths, None, places)

    def weights_of(self, places: Sequence[int]) -> Tensor | None:
        """float32 [N]: the factors of their ids' vectors, or None."""
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


@lru_cache(1024)
def _runs(keys: tuple[int, ...]) -> list[tuple[int, int]]:
    """Keys as ranges [first, stop) of neighbours; batch after batch has the same."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(keys)) if b != a + 1), len(keys)]
    return [(keys[a], keys[b - 1] + 1) for a, b in pairwise(starts)]
