"""A planted click model over Criteo-shaped rows: every number is a hash, so any row of any size can be made on its own.

Row r, stream s: the splitmix64 generator's r-th number from the seed of s. An id's effect on the click is a hash of
(seed, feature, id) in the same way, so a teacher with a hundred million ids has no table.

The logit of a row is a sum of terms, each scaled to a fixed share of its variance:

    LARGE_SHARE   effects of the ids of the features with the most ids: what compressing a table loses first
    SMALL_SHARE   effects of the ids of the other features
    PAIR_SHARE    dot products of id vectors, for a fixed set of feature pairs: what a model without crosses misses
    DENSE_SHARE   the dense columns, linearly
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embtab.datasets.schema import Categorical
from embtab.hashing import mix64, seed_of

LARGE_SHARE, SMALL_SHARE, PAIR_SHARE, DENSE_SHARE = 0.35, 0.15, 0.30, 0.20
NUM_LARGE = 6
EXPONENT = 1.05  # of the power law of ids
MAX_BAG = 5
PAIRS = (("C7", "C15"), ("C15", "C11"), ("C18", "C13"), ("C10", "C18"), ("C26", "C1"), ("C24", "C5"))
_PILOT_ROWS = 131_072  # rows before row 0, on which the shares, the spread and the click rate are set
_STEP = 0x9E3779B97F4A7C15 - 2**64  # the splitmix64 increment

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Teacher:
    """What generated data looks like and how clicks follow from it.

    Args:
        features: the categorical columns, named C1 to C26; `multi` features have 0 to 5 ids in a row.
        dense: names of the dense columns.
        seed: of everything.
        dim: length of the id vectors whose dot products are the pair terms.
        ctr: expected label.
        signal: standard deviation of the logit.
    """

    features: tuple[Categorical, ...]
    dense: tuple[str, ...]
    seed: int
    dim: int
    ctr: float
    signal: float


@dataclass(frozen=True)
class Draws:
    """n generated rows: dense columns, float32 [n]; ids, int64 [n, width]; which of a list feature's ids exist."""

    dense: dict[str, NDArray[np.float32]]
    ids: dict[str, Ints]
    present: dict[str, NDArray[np.bool_]]


def uniform(name: str, part: int, seed: int, rows: Ints) -> Floats:
    """Numbers in (0, 1), one per row, of the stream (name, part, seed)."""
    top52 = (_bits(name, part, seed, rows) >> 12) & (2**52 - 1)
    return top52.astype(np.float64) * 2.0**-52 + 2.0**-53


def _bits(name: str, part: int, seed: int, counters: Ints) -> Ints:
    return np.asarray(mix64(counters * _STEP + seed_of(f"synthetic {name}", part, seed)))


def draw_rows(teacher: Teacher, rows: Ints) -> Draws:
    """Dense columns and ids of the rows with these numbers (int64 [n])."""
    dense, ids, present = {}, {}, {}
    for position, name in enumerate(teacher.dense):
        dense[name] = _draw_counts(teacher, name, 10 ** (3 * position / max(len(teacher.dense) - 1, 1)), rows)
    for feature in teacher.features:
        width = MAX_BAG if feature.multi else 1
        ids[feature.name] = np.stack([_draw_ids(teacher, feature, part, rows) for part in range(width)], axis=1)
        if feature.multi:
            lengths = (uniform(f"length {feature.name}", 0, teacher.seed, rows) * (MAX_BAG + 1)).astype(np.int64)
            present[feature.name] = np.arange(MAX_BAG) < lengths[:, None]
    return Draws(dense, ids, present)


def _draw_counts(teacher: Teacher, name: str, mean: float, rows: Ints) -> NDArray[np.float32]:
    """log(1 + a count), the counts exponentially distributed."""
    count = np.floor(-mean * np.log(uniform(name, 0, teacher.seed, rows)))
    return np.log1p(count).astype(np.float32)


def _draw_ids(teacher: Teacher, feature: Categorical, part: int, rows: Ints) -> Ints:
    """Ids whose frequency falls with the id as a power law, by inverting its distribution function."""
    top = (feature.num_ids + 1.0) ** (1 - EXPONENT)
    u = uniform(feature.name, part, teacher.seed, rows)
    x = np.exp(np.log(1 - u * (1 - top)) / (1 - EXPONENT)) - 1
    ids: Ints = x.astype(np.int64).clip(max=feature.num_ids - 1)
    return ids


def logits(teacher: Teacher, draws: Draws) -> Floats:
    """The true log odds of a click, float64 [n]."""
    weights, bias = _weights(teacher)
    total = np.full(len(next(iter(draws.ids.values()))), bias)
    for weight, term in zip(weights, _terms(teacher, draws), strict=True):
        total += weight * term
    return total


def labels(teacher: Teacher, log_odds: Floats, rows: Ints) -> NDArray[np.float32]:
    """Clicks, float32 0 or 1, drawn with the true probabilities."""
    return (uniform("label", 0, teacher.seed, rows) < sigmoid(log_odds)).astype(np.float32)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


@lru_cache(maxsize=8)
def _weights(teacher: Teacher) -> tuple[list[float], float]:
    """The factor of each term and the bias, such that shares, spread and click rate hold on the pilot rows."""
    terms = list(_terms(teacher, draw_rows(teacher, np.arange(-_PILOT_ROWS, 0))))
    factors = [
        np.sqrt(share) / max(float(term.std()), 1e-9) for share, term in zip(_shares(teacher), terms, strict=True)
    ]
    raw = np.sum([factor * term for factor, term in zip(factors, terms, strict=True)], axis=0)
    scale = teacher.signal / float(raw.std())
    return [float(scale * factor) for factor in factors], _bias(scale * raw, teacher.ctr)


def _bias(log_odds: Floats, rate: float) -> float:
    """The b for which the mean of sigmoid(log_odds + b) is `rate`, by bisection."""
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sigmoid(log_odds + middle).mean() > rate else (middle, high)
    return low


def _shares(teacher: Teacher) -> list[float]:
    """The share of the logit's variance of each term, in the order of `_terms`."""
    large = sorted(teacher.features, key=lambda feature: -feature.num_ids)[:NUM_LARGE]
    small = len(teacher.features) - NUM_LARGE
    ids = [LARGE_SHARE / NUM_LARGE if feature in large else SMALL_SHARE / small for feature in teacher.features]
    return ids + [PAIR_SHARE / len(PAIRS)] * len(PAIRS) + [DENSE_SHARE / len(teacher.dense)] * len(teacher.dense)


def _terms(teacher: Teacher, draws: Draws) -> Iterator[NDArray[np.floating]]:
    """The unscaled terms of the logit, [n] each: effects of ids, crosses of pairs, dense columns."""
    for feature in teacher.features:
        effect = _effects(teacher, feature.name, draws.ids[feature.name])
        yield _pooled(effect, draws.present.get(feature.name))
    vectors = {name: _vectors(teacher, name, draws) for name in sorted({name for pair in PAIRS for name in pair})}
    for left, right in PAIRS:
        yield (vectors[left] * vectors[right]).sum(axis=1)
    for position, name in enumerate(teacher.dense):
        yield draws.dense[name].astype(np.float64) * (-1) ** position


def _effects(teacher: Teacher, name: str, ids: Ints) -> Floats:
    """One bell-shaped number of mean 0 and variance 1 per id: the sum of the four 16-bit parts of a hash."""
    total: Floats = _quarters(_bits(f"effect {name}", 0, teacher.seed, ids)).sum(axis=-1, dtype=np.float64)
    return total / 2


def _vectors(teacher: Teacher, name: str, draws: Draws) -> NDArray[np.float32]:
    """The vector of each row's ids of a feature, float32 [n, dim], summed over bags."""
    ids = draws.ids[name]
    parts = [_quarters(_bits(f"vector {name}", part, teacher.seed, ids)) for part in range(-(-teacher.dim // 4))]
    vectors = np.concatenate(parts, axis=-1)[..., : teacher.dim]
    return _pooled(vectors, draws.present.get(name))


def _quarters(bits: Ints) -> NDArray[np.float32]:
    """Four uniform numbers of mean 0 and variance 1 from every hash: [...] to [..., 4]."""
    sixteens = np.ascontiguousarray(bits).astype("<i8").view("<u2").reshape(*bits.shape, 4)
    return (sixteens.astype(np.float32) - 32767.5) * np.float32(np.sqrt(12) / 65536)


def _pooled(values: NDArray[Any], present: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Sums [n, width, ...] over the ids that exist."""
    if present is None:
        return values[:, 0]
    total: NDArray[Any] = (values * present.reshape(*present.shape, *[1] * (values.ndim - 2))).sum(axis=1)
    return total
