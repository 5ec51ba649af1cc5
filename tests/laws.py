"""The methods under the law suite (one row a method) and the inputs the laws are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.features import id_spaces
from embtab.learned.forms import plan_of
from embtab.methods import Spec

DIM = 16
EXTREMES = [0, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)]
# Cardinalities from trivial to large, a mean-pooled feature, and two features that share an id space.
FEATURES = [
    et.Feature("colour", 3),
    et.Feature("shop", 40, pooling="mean"),
    et.Feature("item", 1000, id_space="items"),
    et.Feature("seen", 1000, id_space="items", pooling="mean"),
    et.Feature("user", 5000),
]


@dataclass(frozen=True, eq=False)
class Case:
    """A method as a user asks for it, with a budget that makes it compress."""

    name: str
    method: Any
    budget: Any = "0.3x"
    counts: Callable[[int], np.ndarray] | None = None
    """How often each of n ids occurs, for methods that must know it."""

    def plan(self, features: list[et.Feature] = FEATURES, dim: int = DIM, seed: int = 0) -> et.Plan:
        if self.counts:
            features = [replace(feature, counts=self.counts(feature.num_ids)) for feature in features]
        return et.plan(features, self.method, self.budget, dim, seed)


def falling(n: int) -> np.ndarray:
    """Counts of ids numbered by frequency."""
    return 10_000 // np.arange(1, n + 1)


def shuffled(n: int) -> np.ndarray:
    """Counts of ids in no order."""
    return np.random.default_rng(n).permutation(falling(n))


@dataclass(frozen=True, eq=False)
class Found(Case):
    """A shape as a search may find it: rows and entries without any order, in the form of the fewest bytes."""

    rows: float = 1.0
    entries: float = 1.0

    def plan(self, features: list[et.Feature] = FEATURES, dim: int = DIM, seed: int = 0) -> et.Plan:
        masks = {}
        for space in id_spaces(features):
            random = np.random.default_rng([seed, *space.name.encode()])
            mask = random.random((space.num_ids, dim)) < self.entries
            mask &= (random.random(space.num_ids) < self.rows)[:, None]
            mask[0, 0] = True
            masks[space.name] = mask
        return plan_of(features, masks, Spec(dim, seed), None)


CASES = [
    Case("dense", "dense", None),
    Case("hash", "hash"),
    Case("unified", "unified"),
    Case("unified, 4 chunks", {"name": "unified", "chunks": 4}),
    Case("qr product", "qr"),
    Case("qr sum", {"name": "qr", "op": "sum"}),
    Case("qr concat", {"name": "qr", "op": "concat"}),
    Case("cce", "cce", "0.5x"),
    Case("cce, 2 chunks", {"name": "cce", "chunks": 2, "centroids": 300}, "0.5x"),
    Case("cafe", "cafe"),
    Case("multihash", "multihash"),
    Case("multihash, 3 hashes, tables apart", {"name": "multihash", "hashes": 3, "shared": False}),
    Case("multihash weighted", {"name": "multihash", "weighted": True}),
    Case("freqcut", "freqcut"),
    Case("freqcut by counts", "freqcut", counts=falling),
    Case("memcom", "memcom"),
    Case("robe", "robe"),
    Case("robe, exact", {"name": "robe", "chunk": 4, "granule": 1}),
    Case("tt", "tt"),
    Case("dhe", "dhe"),
    Case("partitions", "partitions"),
    Case("partitions crt concat", {"name": "partitions", "kind": "crt", "op": "concat", "parts": 4}),
    Case("lowrank", "lowrank"),
    Case("lowrank with a bias", {"name": "lowrank", "bias": True}),
    Case("mixed_dim", "mixed_dim"),
    Case("mixed_dim blocks", {"name": "mixed_dim", "blocks": 6}, "0.4x", counts=falling),
    Case("mixed_dim blocks, mapped", {"name": "mixed_dim", "blocks": 6}, "0.4x", counts=shuffled),
    Case("pruned", "pruned"),
    Case("pruned, mapped", {"name": "pruned", "width": 3}, "0.1x", counts=shuffled),
    Case("sparse", {"name": "sparse", "form": "bitmap"}),
    Case("sparse csr", {"name": "sparse", "form": "csr"}, "0.4x"),
    Found("found rows", "pruned", rows=0.2),
    Found("found entries", "sparse", rows=0.5, entries=0.3),
    Found("found few entries", "sparse", rows=0.8, entries=0.02),
    Case("mixed", {"colour": "dense", "items": {"name": "qr", "op": "concat"}, "user": "qr", "*": "unified"}),
]


@dataclass
class Bags:
    """Ids of every feature as bags: per feature, `bags` lists of (id, weight)."""

    content: dict[str, list[list[tuple[int, float]]]]

    def kjt(self, weighted: bool) -> KeyedJaggedTensor:
        flat = [pair for bags in self.content.values() for bag in bags for pair in bag]
        return KeyedJaggedTensor(
            keys=list(self.content),
            values=torch.tensor([i for i, _ in flat], dtype=torch.int64),
            lengths=torch.tensor([len(bag) for bags in self.content.values() for bag in bags], dtype=torch.int32),
            weights=torch.tensor([w for _, w in flat], dtype=torch.float32) if weighted else None,
        )

    def arrays(self, feature: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [N], offsets [B + 1], weights [N] of one feature."""
        bags = self.content[feature]
        ids = np.array([i for bag in bags for i, _ in bag], dtype=np.int64)
        weights = np.array([w for bag in bags for _, w in bag], dtype=np.float32)
        return ids, np.cumsum([0, *map(len, bags)]), weights


@st.composite
def batches(draw: st.DrawFn, plan: et.Plan) -> Bags:
    """Random bags for a plan, with empty bags, repeated ids, and extreme ids where the method takes any int64."""
    size = draw(st.integers(1, 5))
    weight = st.floats(-2, 2, width=32)
    content = {}
    for feature in plan.features:
        ids = st.integers(0, feature.num_ids - 1)
        if plan.encoding(feature.name).num_ids is None:
            ids = ids | st.sampled_from(EXTREMES) | st.integers(-(2**63), 2**63 - 1)
        bag = st.lists(st.tuples(ids, weight), max_size=4)
        content[feature.name] = draw(st.lists(bag, min_size=size, max_size=size))
    return Bags(content)


def tables_of(collection: torch.nn.Module) -> dict[str, np.ndarray]:
    """Physical tables, and further arrays as "space.array", read through the public state dict."""
    state = collection.state_dict()
    beside = (".optimizer", ".training", "_extra_state")  # what only training needs, and what says whose they are
    return {key.split(".", 1)[1]: value.numpy() for key, value in state.items() if not key.endswith(beside)}


def adapted(collection: torch.nn.Module) -> torch.nn.Module:
    """The collection, once methods that adapt while training have seen some ids and reorganised themselves."""
    seen = single_ids({f.name: np.arange(60) % f.num_ids for f in collection.plan.features})
    with torch.no_grad():
        collection(seen)
    collection.adapt(step=1000, epoch=1)
    return collection


def single_ids(feature_ids: dict[str, np.ndarray]) -> KeyedJaggedTensor:
    """One-id bags; every feature must have the same number of ids."""
    values = np.concatenate(list(feature_ids.values()))
    return KeyedJaggedTensor(list(feature_ids), torch.from_numpy(values), lengths=torch.ones(len(values)).int())
