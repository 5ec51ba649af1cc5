"""DIN's regularisation of embeddings, which touches only the rows that a batch looks up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.errors import UserError
from embtab.features import Feature, id_spaces
from embtab.training.layout import Vectors


def minibatch_l2(
    vectors: Vectors, ids: KeyedJaggedTensor, features: Sequence[Feature], counts: Mapping[str, Tensor]
) -> Tensor:
    """DIN's mini-batch aware L2: sum over the distinct ids j of a batch of |w_j|^2 / (2 n_j) (arXiv 1706.06978, 5.2).

    Its gradient is w_j / n_j for every id of the batch, once however often the id occurs, and nothing for any other:
    over an epoch with one batch per occurrence an id is decayed once. It is laid on the vectors that were looked up,
    so it reaches tables whose optimizer is fused into backward (which then treats it like any gradient), and of a
    compressed table the rows that the vectors came from.

    Args:
        vectors: of every feature's ids, as `EmbeddingCollection` gives them.
        ids: the ids.
        features: those of the collection.
        counts: float [num_ids] by id space: n_j, occurrences of each id in the training data; at least 1.

    Returns:
        A number, to be multiplied by the strength and added to the loss.
    """
    spaces: dict[str, list[str]] = {}
    for feature in features:
        spaces.setdefault(feature.space, []).append(feature.name)
    total = vectors[features[0].name].values().new_zeros(())
    for space, names in spaces.items():
        looked_up = torch.cat([ids[name].values() for name in names])
        _, inverse, repeats = looked_up.unique(return_inverse=True, return_counts=True)
        found = torch.cat([vectors[name].values() for name in names])
        seen = counts[space].to(found.device)[looked_up]
        total = total + (found.square().sum(1) / (2 * seen * repeats[inverse])).sum()
    return total


def id_counts(features: Sequence[Feature]) -> dict[str, Tensor]:
    """How often each id occurs in the training data, at least 1: float [num_ids] by id space.

    Raises:
        UserError: when a feature has no counts.
    """
    counts = {}
    for space in id_spaces(features):
        if space.counts is None:
            raise UserError(f"l2 needs the counts of {space.name!r}; prepare the data again, or set l2 to 0")
        counts[space.name] = torch.from_numpy(np.maximum(space.counts, 1)).float()
    return counts
