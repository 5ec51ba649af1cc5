"""What is looked up: features of Criteo's cardinalities, and batches of ids of a chosen skew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.datasets.synthetic import CARDINALITIES
from embtab.features import Feature

ZIPF = 1.05


@dataclass(frozen=True)
class Case:
    """One point of a measurement.

    Args:
        dim: D, the width of a vector.
        batch: B, rows of a batch.
        bag: ids in each bag.
        skew: "zipf" (exponent 1.05, the first ids the most frequent) or "uniform".
        cap: cardinalities above it are cut to it; None leaves them.
        scale: multiplies Criteo's cardinalities first.
    """

    dim: int = 16
    batch: int = 4096
    bag: int = 1
    skew: str = "zipf"
    cap: int | None = 100_000
    scale: float = 1.0

    @property
    def cardinalities(self) -> list[int]:
        """Of the 26 features."""
        return [min(max(round(n * self.scale), 2), self.cap or 2**62) for n in CARDINALITIES]

    @property
    def num_ids(self) -> int:
        """Of all features together."""
        return sum(self.cardinalities)

    @property
    def features(self) -> list[Feature]:
        """C1 to C26."""
        return [Feature(f"C{i}", n) for i, n in enumerate(self.cardinalities, 1)]

    @property
    def lookups(self) -> int:
        """Ids in a batch."""
        return self.batch * self.bag * len(CARDINALITIES)

    def batches(self, count: int, device: torch.device, seed: int = 0) -> list[KeyedJaggedTensor]:
        """Batches of ids, already on the device."""
        names = [feature.name for feature in self.features]
        lengths = torch.full((len(names) * self.batch,), self.bag, dtype=torch.int64)
        made = []
        for i in range(count):
            rng = np.random.default_rng((seed, i))
            values = np.concatenate([draw(rng, n, self.batch * self.bag, self.skew) for n in self.cardinalities])
            batch = KeyedJaggedTensor(names, torch.from_numpy(values), lengths=lengths).to(device)
            batch.offset_per_key()
            batch.offsets()
            made.append(batch)
        return made


def draw(rng: np.random.Generator, num_ids: int, size: int, skew: str) -> NDArray[np.int64]:
    """int64 [size]: ids in [0, num_ids), uniform or Zipf-distributed (by inversion of the continuous power law)."""
    uniform = rng.random(size)
    if skew == "uniform" or num_ids < 2:
        return (uniform * num_ids).astype(np.int64)
    power = 1 - ZIPF
    drawn = (((num_ids + 1) ** power - 1) * uniform + 1) ** (1 / power)
    return np.minimum(drawn.astype(np.int64), num_ids) - 1


def numeric(case: Case, count: int, device: torch.device, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """13 numeric columns [B, 13] and labels [B] of as many batches."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        dense = torch.rand(case.batch, 13, generator=generator)
        label = (torch.rand(case.batch, generator=generator) < 0.25).float()
        made.append((dense.to(device), label.to(device)))
    return made
