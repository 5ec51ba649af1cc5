"""The train form that learned methods share: dense tables on the fused lookup, and a gate between lookup and pooling.

    ids [N] --lookup--> rows [N, D] --gate--> vectors [N, D] --pool--> [B, F, D] --gate.pooled--> [B, F, D]

    N ids of the batch   B bags   F features   D dimension   S id spaces   R rows of all tables

A gate masks, scales or cuts what the lookup gave: rows stay in the fused lookup and its backward updates them from the
gradient that the gate passes on, so every gate that works on the looked-up rows trains at the lookup's speed. What does
not work so is a penalty or weight decay on the tables themselves, which no lookup has read, and a second derivative
through an update that happens inside backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.features import Feature, id_spaces
from embtab.fused import Optimizer
from embtab.planning import plan
from embtab.tables import EmbeddingBagCollection
from embtab.tables.batch import Cut
from embtab.tables.blocks import per_bag


class Gate(nn.Module):
    """What a method does between lookup and pooling; by itself nothing."""

    def forward(self, rows: Tensor, places: Tensor, spaces: Tensor) -> Tensor:
        """The vectors [N, D] of ids.

        Args:
            rows: float32 [N, D], as looked up.
            places: int64 [N], where each row is among the R rows of all tables.
            spaces: int64 [N], the id space of each.
        """
        return rows

    def pooled(self, vectors: Tensor) -> Tensor:
        """What becomes of the pooled vectors [B, F, D], for what is drawn or chosen per sample and feature."""
        return vectors

    def penalty(self) -> Tensor | None:
        """What is added to the loss of every batch."""
        return None

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the gate's parameters; none by default. The ranker's and the tables' are not the gate's business."""
        return []


class Masked(Gate):
    """Entries outside a mask are zero, and get no gradient.

    Args:
        mask: bool [R, D], the tables one after the other.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, rows: Tensor, places: Tensor, spaces: Tensor) -> Tensor:
        """The rows, zero where the mask says so."""
        return rows * self.get_buffer("mask")[places]


class Supernet(EmbeddingBagCollection):
    """Dense tables behind a gate; a KeyedJaggedTensor in, pooled vectors out, as of any `EmbeddingBagCollection`.

    Args:
        features: the model's features.
        dim: D.
        gate: the method's.
        optimizer: of the tables, fused into backward.
        init_std: standard deviation of the first rows.
        device: where everything lives.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        dim: int,
        gate: Gate,
        optimizer: Optimizer | None = None,
        init_std: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(plan(features, "dense", None, dim), "fbgemm", optimizer, init_std, device)
        self.gate = gate.to(device)
        self.spaces = id_spaces(features)
        self.detached = False
        index = {space.name: i for i, space in enumerate(self.spaces)}
        owners = torch.tensor([index[feature.space] for feature in features], device=device)
        self.register_buffer("owners", owners, persistent=False)

    def vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """[B, F, D], features in plan order."""
        cut, (block,) = Cut(features, self.names), self._each_block()
        block.check(cut)
        ids, sizes = cut.ids, cut.sizes
        (request,) = block.requests(block.rows(ids, sizes), sizes, None, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            (rows,) = self.lookup([request])
        counts = torch.tensor(sizes, device=ids.device)
        spaces = self.get_buffer("owners").repeat_interleave(counts, output_size=len(ids))
        each = self.gate(rows, request.rows, spaces)
        sums = block.pool(each, cut.lengths, cut.weights_of(block.places))
        return self.gate.pooled(self._divided(per_bag(sums, len(block.places), cut.stride), cut))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it backward does not update the tables, so that a gate's own step leaves them alone."""
        self.detached = True
        try:
            yield
        finally:
            self.detached = False

    def rows(self) -> dict[str, Tensor]:
        """The tables float32 [num_ids, D] by id space, as they are stored: writing to one writes to it."""
        return {space.name: self.lookup.table(space.name) for space in self.spaces}

    @torch.no_grad()
    def gated(self) -> dict[str, Tensor]:
        """The vectors float32 [num_ids, D] of all ids by id space, once through the gate (without `pooled`)."""
        vectors, place = {}, 0
        for i, (name, rows) in enumerate(self.rows().items()):
            places = torch.arange(place, place + len(rows), device=rows.device)
            vectors[name] = self.gate(rows.clone(), places, torch.full_like(places, i))
            place += len(rows)
        return vectors

    def seen(self) -> dict[str, np.ndarray]:
        """Rows that training has updated, bool [num_ids] by id space; all of them where the optimizer is plain sgd.

        The others hold what they were drawn as, which no loss has ever looked at.
        """
        moments = self.lookup.optimizer_state()
        return {
            name: (moments[name].reshape(len(rows), -1) != 0).any(1).cpu().numpy()
            if name in moments
            else np.ones(len(rows), dtype=bool)
            for name, rows in self.rows().items()
        }

    @property
    def training_nbytes(self) -> int:
        """Bytes of tables, what their optimizer remembers, and the gate."""
        tensors = [*self.rows().values(), *self.lookup.optimizer_state().values()]
        tensors += [*self.gate.parameters(), *self.gate.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def joined(masks: Mapping[str, np.ndarray]) -> Tensor:
    """Bool [R, ...]: the masks of all id spaces, one after the other."""
    return torch.from_numpy(np.concatenate(list(masks.values())))
