"""method="auto": a method and a precision for every feature, from cardinalities, counts and budget alone.

The rule, in the order in which it is applied (docs/results/auto.md has the measurements behind it):

1. Where the dense tables fit in int4 rows or better, they are taken: rounding to int8 (20 bytes for a row of 16 numbers
   instead of 64) cost nothing that could be measured, int4 (12 bytes) 0.0002 AUC. All features get the finest precision
   that fits for all of them; what is left makes the smallest finer still.
2. Else the smallest features stay dense, as long as together they take no more than a tenth of the budget: a gender
   that shares rows with another costs as much quality as a user that does, and saves nothing. What they leave of the
   tenth makes the smallest of them finer than int4.
3. What is left is served in int4, for what it saves buys rows. It is asked how many of its ids matter: the perplexity
   of their counts, the *effective* number of ids.
   - Less than a quarter of the ids: a few ids carry the traffic. No two of them meet in both their hashed rows, and the
     others are noise to them: two hashed rows of one table that all features share, side by side (unified).
   - More: most ids matter, and codes that keep them apart by their structure beat random ones. A narrow row for each
     id with a projection (lowrank) while half the width fits, then the product of two complementary parts (qr), or of
     three (partitions) where two do not fit. Without counts all ids are taken to matter alike.

Hashed ids (any int64) have no row of their own: they are unified whatever the budget, and the rules hold for the rest.

Where even that does not fit, rows are hashed; below one row per feature nothing is feasible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embtab.features import Feature
from embtab.methods.base import Spec

COARSE_TO_FINE = ("int4", "int8", "fp32")
"""The precisions that are chosen from."""
SMALL = 0.1
"""Share of the budget that features too small to compress may take."""
EVEN = 0.25
"""Effective ids, as a share of the ids, from which on structure is better than hashing."""

Choice = dict[str, dict[str, str]]
"""By id space, the name of a method and the precision of its rows."""


def choices(spaces: Sequence[Feature], limit: int | None, dim: int, precision: str | None = None) -> list[Choice]:
    """The choice of the rule, and after it what to take where it is infeasible.

    Args:
        spaces: one feature per id space.
        limit: serving bytes; None for no limit.
        dim: D, the width of every vector.
        precision: the only one to use; None to choose.
    """
    hashed = [space for space in spaces if space.hashed]
    if limit is None:
        finest = precision or COARSE_TO_FINE[-1]
        return [_all(spaces, "dense", finest) | _all(hashed, "unified", finest)]
    specs = [Spec(dim, precision=name) for name in (COARSE_TO_FINE if precision is None else (precision,))]
    coarse = specs[0]
    if not hashed and coarse.dense_bytes_of(spaces) <= limit:
        return [_dense(spaces, limit, specs)]
    by_size = sorted(spaces, key=lambda space: (space.hashed, space.num_ids, space.name))
    most = len(spaces) - max(len(hashed), 1)
    fitting = [k for k in range(most + 1) if coarse.dense_bytes_of(by_size[:k]) <= SMALL * limit]
    small, large = by_size[: fitting[-1]], by_size[fitting[-1] :]
    share = (limit - coarse.dense_bytes_of(small)) / coarse.dense_bytes_of(large)
    fits_half = coarse.row_bytes(max(dim // 2, 1)) <= share * coarse.row_bytes(dim)
    structures = ["lowrank"] * fits_half + ["qr", "partitions", "unified"]
    even = [space for space in large if not space.hashed and effective_ids(space) >= EVEN * space.num_ids]
    exact, rest = _dense(small, int(SMALL * limit), specs), _all(large, "unified", coarse.precision)
    return [exact | rest | _all(even, structure, coarse.precision) for structure in structures]


def _all(spaces: Sequence[Feature], method: str, precision: str) -> Choice:
    """One method and precision for all."""
    return {space.name: {"name": method, "precision": precision} for space in spaces}


def _dense(spaces: Sequence[Feature], limit: int, specs: Sequence[Spec]) -> Choice:
    """Dense tables, which fit in the coarsest precision: all as fine as fits, then the smallest finer still."""
    chosen = dict.fromkeys((space.name for space in spaces), specs[0])
    left = limit - specs[0].dense_bytes_of(spaces)
    for finer in specs[1:]:
        for space in sorted(spaces, key=lambda space: (space.num_ids, space.name)):
            more = finer.dense_bytes(space) - chosen[space.name].dense_bytes(space)
            if more <= left:
                chosen[space.name] = finer
                left -= more
    return {name: {"name": "dense", "precision": spec.precision} for name, spec in chosen.items()}


def effective_ids(space: Feature) -> float:
    """The perplexity of the ids: exp of the entropy of their counts; their number where counts are unknown or zero."""
    if space.counts is None or not space.counts.any():
        return float(space.num_ids)
    seen = space.counts[space.counts > 0]
    frequency = seen / seen.sum()
    return float(np.exp(-(frequency * np.log(frequency)).sum()))
