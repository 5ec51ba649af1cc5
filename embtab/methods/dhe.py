"""DHE, deep hash embedding: no table at all; a small network decodes hashes of the id.

Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation", KDD 2021, arXiv
2010.10784. k hashes of the id into a million buckets, scaled to [-1, 1], are a dense code that a decoder turns into the
vector:

    x[i] = 2 h_i(id) / (buckets - 1) - 1        x <- f(W x + b) for every hidden layer        e = W x + b

There is a decoder per id space, so a space's bytes stay in proportion to what its dense table would take.

Differs from the paper:
- No batch normalisation: its statistics would make the vector of an id depend on the rest of the batch. Weights start
  by He's rule instead, and the last layer so that composed entries have the dense table's standard deviation.
- f is a leaky ReLU, max(x, x / 100), instead of Mish, slower and no better at equal bytes (on MovieLens-100k); a
  plain ReLU, as in thomasahle/cce, leaves a narrow decoder without gradients for ids that make no hidden number
  positive.
- At most 128 hashes instead of 1024, and never more than the decoder is wide (as in cce): the decoder runs for every id
  of a bag, so 1024 hashes cost a CPU eight times as much, and at equal bytes they leave a decoder so narrow that small
  budgets could not be met at all.
- Two hidden layers instead of five: at equal bytes, fewer layers are wider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import hash_rows, seed_of
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec

BUCKETS = 1_000_000
SLOPE = 0.01  # of the activation below zero
MOST = 2**16  # hashes, and numbers of a layer
GOLDEN = 0x9E3779B97F4A7C15  # the step between the seeds of splitmix64's own stream


@dataclass(frozen=True)
class DHE(Encoding):
    """`hashes` hashes of the id, decoded by `layers` hidden layers of `width` and a linear one; any int64 is an id."""

    seed: int
    hashes: int
    width: int
    layers: int

    method: ClassVar[str] = "dhe"

    @property
    def linear(self) -> bool:
        """The decoder is a network."""
        return False

    def check(self) -> None:
        """A decoder that can be computed."""
        for name, most in (("hashes", MOST), ("width", MOST), ("layers", 64)):
            require(1 <= getattr(self, name) <= most, f"{name} is {getattr(self, name)}, beyond 1 to {most}")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """There are no tables."""
        return []

    def layer_shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of every layer."""
        sizes = [self.hashes, *[self.width] * self.layers, self.dim]
        return list(zip(sizes[1:], sizes[:-1], strict=True))

    def arrays(self) -> dict[str, ArraySpec]:
        """Weights by He's rule for what each layer reads, biases of zero; the last layer follows the vectors' std."""
        made: dict[str, ArraySpec] = {}
        for k, (outputs, inputs) in enumerate(self.layer_shapes()):
            # The mean square of what it reads: uniform in [-1, 1], or the activation of a standard normal number.
            mean_square = 1 / 3 if k == 0 else (1 + SLOPE**2) / 2
            std = 1 / math.sqrt(inputs * mean_square)
            last = k == self.layers
            made[f"weight{k}"] = ArraySpec((outputs, inputs), std=std, part="decoder", relative=last)
            made[f"bias{k}"] = ArraySpec((outputs,), part="decoder")
        return made

    def constants(self) -> dict[str, tuple[int, ...]]:
        """A seed per hash."""
        seeds = ((self.seed + k * GOLDEN) % 2**64 for k in range(self.hashes))
        return {"seed": tuple(seed - 2**64 if seed >= 2**63 else seed for seed in seeds)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The buckets that the id falls into."""
        return hash_rows(ids, c["seed"], BUCKETS)

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The decoder's output for the buckets [N, hashes]."""
        kind = arrays["weight0"].dtype
        wide = kind if kind == torch.float64 else torch.float32  # 16 bits hold no number of a bucket
        vectors = (parts[0].to(wide) * (2 / (BUCKETS - 1)) - 1).to(kind)
        for k in range(self.layers):
            vectors = F.leaky_relu(F.linear(vectors, arrays[f"weight{k}"], arrays[f"bias{k}"]), SLOPE)
        return F.linear(vectors, arrays[f"weight{self.layers}"], arrays[f"bias{self.layers}"])

    def start(self, std: float) -> Sequence[PartInit]:
        """There are no tables."""
        return []

    @classmethod
    def solve(
        cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, hashes: int = 128, layers: int = 2
    ) -> Solution:
        """The widest decoders that fit each space's share; spaces that would not shrink stay dense.

        Args:
            spaces: the id spaces.
            budget: serving bytes; None for no limit.
            spec: dimension and seed; decoders are float32 whatever the precision of rows.
            hashes: the most hashes of an id; a decoder that is narrower uses as many as it is wide.
            layers: hidden layers.
        """
        if hashes < 1 or layers < 1:
            raise UserError(f"dhe: hashes and layers must be at least 1; got hashes={hashes}, layers={layers}")

        def nbytes(width: int) -> int:
            inner = (min(hashes, width) + 1 + (layers - 1) * (width + 1)) * width
            return 4 * (inner + (width + 1) * spec.dim)

        def choose(space: Feature, target: int) -> Solution:
            dense = spec.dense_bytes(space)
            low, high = 1, 2
            while nbytes(high) <= min(target, dense):
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if nbytes(middle) <= target else (low, middle)
            if dense <= max(target, nbytes(low)) and not space.hashed:
                return dense_solution(space, spec)
            seed = seed_of(space.name, 0, spec.seed)
            return Solution([cls(spec.dim, None, (), seed, min(hashes, low), low, layers)], [])

        return fill(spaces, budget, spec, cls.method, choose)
