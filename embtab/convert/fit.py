"""Tables of a method that come closest to given dense tables: least squares, weighted by how often each id occurs.

minimise over tables T:  sum over spaces and ids i of  w[i] |E[i] - vector(i; T)|^2

    vectors that are rows side by side (dense, hash, unified, ...)   weighted means of what shares a row: exact
    rows through a projection (low rank, mixed dimension)            the leading directions of E'wE: exact
    other vectors linear in the tables (sums: qr, multi-hash, CCE)   conjugate gradients on the normal equations
    products of two rows (qr, MEmCom)                                alternating least squares, exact in each half
    tensor trains                                                    TT-SVD, then alternating least squares
    anything else                                                    Adam on the composed vectors

Where a method has integer arrays of its own, they are first set from E: CCE's pointers by k-means, CAFE's slots by w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from embtab.convert.tt_svd import fit_cores
from embtab.methods import Encoding
from embtab.methods.kmeans import kmeans, nearest

CHUNK = 2**17  # ids composed at a time
CG_STEPS = 200
PRODUCT_STEPS = 30
ADAM_STEPS, ADAM_BATCH, ADAM_RATE = 1000, 2048, 0.05

Tables = Mapping[str, Tensor]


@dataclass(frozen=True)
class Target:
    """What the vectors of one id space should be.

    Args:
        encoding: of the space.
        dense: float32 [n, D], the vectors of ids 0..n-1.
        weights: float32 [n], positive.
        arrays: of the encoding, by name; fits write to them.
        widths: of the parts' tables.
    """

    encoding: Encoding
    dense: Tensor
    weights: Tensor
    arrays: Mapping[str, Tensor]
    widths: tuple[int, ...]

    @property
    def trained(self) -> list[Tensor]:
        """The arrays that hold numbers, not indices."""
        return [array for array in self.arrays.values() if array.is_floating_point()]

    def rows(self, ids: Tensor) -> Tensor:
        """int64 [N, K]: the rows of every part; -1 where an id lacks it."""
        constants = {name: torch.tensor([value]) for name, value in self.encoding.constants().items()}
        rows: Tensor = self.encoding.rows(ids.unsqueeze(1), constants | dict(self.arrays))
        return rows

    def compose(self, ids: Tensor, tables: Tables, arrays: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32 [N, D]: the vectors of ids [N]."""
        rows = self.rows(ids)
        parts = [tables[name][rows[:, k].clamp(min=0)] for k, name in enumerate(self.encoding.tables)]
        if self.encoding.may_skip:
            parts = [torch.where(rows[:, k : k + 1] >= 0, part, 0.0) for k, part in enumerate(parts)]
        return self.encoding.combine(parts or [rows], self.arrays if arrays is None else arrays)

    def chunks(self) -> Iterator[Tensor]:
        """All ids, in pieces."""
        yield from torch.arange(len(self.dense)).split(CHUNK)


@torch.no_grad()
def fit(targets: Sequence[Target], tables: Tables, seed: int) -> None:
    """Writes the best fit known for each method to `tables` and to the targets' arrays.

    Args:
        targets: one per id space.
        tables: float32 [R, W] by name; every table is read by these spaces alone.
        seed: of whatever starts at random.
    """
    generator = np.random.default_rng(seed)
    groups: dict[Callable[..., None], list[Target]] = {}
    for target in targets:
        prepare = PREPARE.get(target.encoding.method)
        if prepare:
            prepare(target, generator)
        groups.setdefault(_way(target), []).append(target)
    for way, members in groups.items():
        way(members, {name: tables[name] for target in members for name in target.encoding.tables}, generator)


def _way(target: Target) -> Callable[..., None]:
    encoding = target.encoding
    if encoding.method == "tt":
        return tensor_trains
    if target.trained:
        return leading_directions if encoding.method in ("lowrank", "mixed_dim") else descend
    if not encoding.tables or not encoding.linear:
        return alternate if encoding.tables and _is_product(target) else descend
    return mean_rows if _is_side_by_side(target) else conjugate_gradients


def _random_parts(target: Target) -> list[Tensor]:
    """Two made-up vectors' parts, to see what `combine` does with them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, width, generator=generator) for width in target.widths]


def _is_side_by_side(target: Target) -> bool:
    parts = _random_parts(target)
    made = target.encoding.combine(parts, target.arrays)
    return not target.encoding.may_skip and torch.equal(made, torch.cat(parts, dim=1))


def _is_product(target: Target) -> bool:
    parts = _random_parts(target)
    widths = (target.encoding.dim, target.encoding.dim), (target.encoding.dim, 1)
    made = target.encoding.combine(parts, target.arrays)
    return target.widths in widths and torch.equal(made, parts[0] * parts[1])


def mean_rows(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """Each row becomes the weighted mean of the pieces of vectors that read it; a row that none reads becomes zero."""
    sums = {name: torch.zeros_like(table, dtype=torch.float64) for name, table in tables.items()}
    counts = {name: torch.zeros(len(table), dtype=torch.float64) for name, table in tables.items()}
    for target in targets:
        for ids in target.chunks():
            rows, weights, start = target.rows(ids), target.weights[ids].double(), 0
            for k, name in enumerate(target.encoding.tables):
                piece = target.dense[ids, start : start + tables[name].shape[1]].double()
                sums[name].index_add_(0, rows[:, k], piece * weights.unsqueeze(1))
                counts[name].index_add_(0, rows[:, k], weights)
                start += piece.shape[1]
    for name, table in tables.items():
        table.copy_(sums[name] / counts[name].clamp(min=1e-30).unsqueeze(1))


def leading_directions(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """For each part P is the leading eigenvectors of E'wE of its ids, and rows are E P'; a bias is first E's mean."""
    for target in targets:
        everything = target.rows(torch.arange(len(target.dense)))
        for k, name in enumerate(target.encoding.tables):
            ids = (everything[:, k] >= 0).nonzero().squeeze(1)
            dense, rows = target.dense[ids].double(), everything[ids, k]
            weights = target.weights[ids].double().unsqueeze(1)
            if "bias" in target.arrays:
                mean = (weights * dense).sum(0) / weights.sum()
                target.arrays["bias"].copy_(mean)
                dense = dense - mean
            projection = target.arrays.get("projection", target.arrays.get(f"projection{k}"))
            if projection is not None:
                square = dense.t() @ (dense * weights)
                directions = torch.linalg.eigh(square).eigenvectors.flip(1)[:, : len(projection)]
                projection.copy_(directions.t())
                dense = dense @ directions
            tables[name].zero_()
            tables[name][rows] = dense.float()


def conjugate_gradients(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """Solves the normal equations from zero, each row scaled by how much weight reads it."""
    reads = {name: torch.zeros(len(table), 1) for name, table in tables.items()}
    for target in targets:
        for ids in target.chunks():
            rows = target.rows(ids)
            for k, name in enumerate(target.encoding.tables):
                there = rows[:, k] >= 0
                reads[name].index_add_(0, rows[there, k], target.weights[ids][there].unsqueeze(1))
    inverse = {name: torch.where(count > 0, 1 / count, 0.0) for name, count in reads.items()}
    solution = {name: torch.zeros_like(table) for name, table in tables.items()}
    residual = {name: -g for name, g in _gradient(targets, solution, dense=True).items()}
    scaled = {name: inverse[name] * r for name, r in residual.items()}
    direction, size = scaled, _dot(residual, scaled)
    first = size
    for _ in tqdm(range(CG_STEPS), desc="fitting", unit="step", leave=False):
        if size <= 1e-12 * first:
            break
        image = _gradient(targets, direction, dense=False)
        step = size / _dot(direction, image)
        solution = {name: solution[name] + step * direction[name] for name in tables}
        residual = {name: residual[name] - step * image[name] for name in tables}
        scaled = {name: inverse[name] * r for name, r in residual.items()}
        size, before = _dot(residual, scaled), size
        direction = {name: scaled[name] + size / before * direction[name] for name in tables}
    for name, table in tables.items():
        table.copy_(solution[name])


def _gradient(targets: Sequence[Target], tables: Tables, dense: bool) -> dict[str, Tensor]:
    """Of half the weighted squares of the vectors, or of what they lack to E where `dense`."""
    with torch.enable_grad():
        leaves = {name: table.detach().requires_grad_() for name, table in tables.items()}
        for target in targets:
            for ids in target.chunks():
                off = target.compose(ids, leaves)
                if dense:
                    off = off - target.dense[ids]
                (0.5 * (off * off).sum(1) * target.weights[ids]).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def _dot(one: Tables, other: Tables) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


def alternate(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """Products of two rows: either factor is the least-squares answer to the other, in turn."""
    for target in targets:
        rows = target.rows(torch.arange(len(target.dense)))
        weights = target.weights.unsqueeze(1)
        factors = [tables[name] for name in target.encoding.tables]
        factors[1].copy_(torch.from_numpy(generator.standard_normal(factors[1].shape)))
        for step in range(2 * PRODUCT_STEPS):
            fitted, other = step % 2, factors[1 - step % 2][rows[:, 1 - step % 2]]
            above, below = weights * target.dense * other, (weights * other * other).expand_as(target.dense)
            if target.widths[fitted] == 1:  # one number for all of the row
                above, below = above.sum(1, keepdim=True), below.sum(1, keepdim=True)
            empty = torch.zeros_like(factors[fitted])
            above, below = (empty.index_add(0, rows[:, fitted], each) for each in (above, below))
            factors[fitted].copy_(above / below.clamp(min=1e-30))
        if target.widths[0] != target.widths[1]:
            continue
        # Equal sizes of both, so that neither loses more to a coarse precision.
        sizes = [factor.square().mean(0).sqrt().clamp(min=1e-30) for factor in factors]
        factors[0].mul_((sizes[1] / sizes[0]).sqrt())
        factors[1].mul_((sizes[0] / sizes[1]).sqrt())


def tensor_trains(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """Each space's cores, see `embtab.convert.tt_svd`."""
    for target in targets:
        e: Any = target.encoding
        cores = fit_cores(target.dense, target.weights, e.p, e.q, e.ranks)
        for name, core in zip(e.tables, cores, strict=True):
            tables[name].copy_(core.flatten(1))


def descend(targets: Sequence[Target], tables: Tables, generator: np.random.Generator) -> None:
    """Adam, with batches of ids drawn by weight, from the method's own start; steps shrink to nothing."""
    size = float(torch.cat([target.dense.flatten() for target in targets]).square().mean().sqrt()) or 1.0
    for target in targets:
        for name, start in zip(target.encoding.tables, target.encoding.start(size), strict=True):
            tables[name].copy_(torch.from_numpy(generator.normal(start.mean, start.std, tables[name].shape)))
    leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}
    trained = [
        {name: a.detach().clone().requires_grad_() if a.is_floating_point() else a for name, a in target.arrays.items()}
        for target in targets
    ]
    parameters = [*leaves.values(), *(a for arrays in trained for a in arrays.values() if a.is_floating_point())]
    scales = [float(p.detach().square().mean().sqrt()) or 1.0 for p in parameters]
    groups = [{"params": [p], "lr": ADAM_RATE * scale} for p, scale in zip(parameters, scales, strict=True)]
    adam = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / ADAM_STEPS)
    chance = [(target.weights.double().cumsum(0) / float(target.weights.double().sum())) for target in targets]
    shares = [float(target.weights.sum()) for target in targets]
    with torch.enable_grad():
        for _ in tqdm(range(ADAM_STEPS), desc="fitting", unit="step", leave=False):
            loss = torch.zeros(())
            for target, arrays, ladder, share in zip(targets, trained, chance, shares, strict=True):
                drawn = torch.from_numpy(generator.random(min(ADAM_BATCH, len(target.dense))))
                ids = torch.searchsorted(ladder, drawn).clamp(max=len(ladder) - 1)
                off = target.compose(ids, leaves, arrays) - target.dense[ids]
                loss = loss + share / sum(shares) * off.square().sum(1).mean() / size**2
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    for name, table in tables.items():
        table.copy_(leaves[name])
    for target, arrays in zip(targets, trained, strict=True):
        for name, array in arrays.items():
            target.arrays[name].copy_(array)


def _cluster(target: Target, generator: np.random.Generator) -> None:
    """CCE: in every chunk, each id points to the nearest of k centroids of the dense pieces."""
    pointers = target.arrays["pointers"]
    centroids: int = target.encoding.centroids  # type: ignore[attr-defined]
    for j, piece in enumerate(target.dense.chunk(pointers.shape[1], dim=1)):
        pointers[:, j] = nearest(piece, kmeans(piece, centroids, generator)).to(pointers.dtype)


def _hottest(target: Target, generator: np.random.Generator) -> None:
    """CAFE: the most frequent ids of each bucket take its slots."""
    slots = target.arrays["slots"]
    ids = target.weights.sort(descending=True, stable=True).indices
    buckets = target.encoding._bucket(ids)  # type: ignore[attr-defined]
    order = buckets.sort(stable=True).indices
    ids, buckets = ids[order], buckets[order]
    place = torch.arange(len(ids)) - torch.searchsorted(buckets, buckets)
    held = place < 4
    slots[4 * buckets[held] + place[held]] = ids[held]


PREPARE: dict[str, Callable[[Target, np.random.Generator], None]] = {"cce": _cluster, "cafe": _hottest}
