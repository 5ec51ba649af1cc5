"""method="auto": a method and a precision for every feature, from cardinalities, counts and budget alone.

The rule, in the order in which it is applied (configs/README.md has the measurements behind it):

1. Where the dense float32 tables fit, they are taken. Nothing beat them by more than noise.
2. Else, where they fit with rows served in int8 (a row of 16 numbers takes 20 bytes instead of 64), those.
3. Else rows are served in int4 (12 bytes): rounding dense tables to it cost 0.0002 AUC, and what it saves buys rows.
   Where the dense tables fit in int4, they are taken.
4. The smallest features stay dense, as long as together they take no more than a tenth of the budget: a gender that
   shares rows with another costs as much quality as a user that does, and saves nothing.
5. What is left is asked how many of its ids matter: the perplexity of their counts, the *effective* number of ids.
   - Less than a quarter of the ids: a few ids carry the traffic. No two of them meet in both their hashed rows, and the
     others are noise to them: two hashed rows of one table that all features share, side by side (unified).
   - More: most ids matter, and codes that keep them apart by their structure beat random ones. A narrow row for each
     id with a projection (lowrank) while half the width fits, then the product of two complementary parts (qr), or of
     three (partitions) where two do not fit. Without counts all ids are taken to matter alike.

Where even that does not fit, rows are hashed; below one row per feature nothing is feasible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embtab.features import Feature
from embtab.methods.base import Spec

SMALL = 0.1
"""Share of the budget that features too small to compress may take."""
EVEN = 0.25
"""Effective ids, as a share of the ids, from which on structure is better than hashing."""


class Choice(NamedTuple):
    """A precision, and by id space the name of a method."""

    precision: str
    methods: dict[str, str]


def choices(spaces: Sequence[Feature], limit: int | None, dim: int, precision: str | None = None) -> list[Choice]:
    """The choice of the rule, and after it what to take where it is infeasible.

    Args:
        spaces: one feature per id space.
        limit: serving bytes; None for no limit.
        dim: D, the width of every vector.
        precision: the only one to use; None to choose.
    """
    for name in ("fp32", "int8", "int4") if precision is None else (precision,):
        spec = Spec(dim, precision=name)
        if limit is None or sum(map(spec.dense_bytes, spaces)) <= limit:
            return [Choice(name, {space.name: "dense" for space in spaces})]
    assert limit is not None
    small = _small(spaces, int(SMALL * limit), spec)
    large = [space for space in spaces if space.name not in small]
    share = (limit - sum(small.values())) / sum(map(spec.dense_bytes, large))
    fits_half = spec.row_bytes(max(dim // 2, 1)) <= share * spec.row_bytes(dim)
    structures = ["lowrank"] * fits_half + ["qr", "partitions", "unified"]
    methods = dict.fromkeys(small, "dense") | {space.name: "unified" for space in large}
    even = [space.name for space in large if effective_ids(space) >= EVEN * space.num_ids]
    return [Choice(spec.precision, methods | dict.fromkeys(even, structure)) for structure in structures]


def effective_ids(space: Feature) -> float:
    """The perplexity of the ids: exp of the entropy of their counts; their number where counts are unknown or zero."""
    if space.counts is None or not space.counts.any():
        return float(space.num_ids)
    seen = space.counts[space.counts > 0]
    frequency = seen / seen.sum()
    return float(np.exp(-(frequency * np.log(frequency)).sum()))


def _small(spaces: Sequence[Feature], most: int, spec: Spec) -> dict[str, int]:
    """The dense bytes of the smallest spaces that together take no more than `most`."""
    taken: dict[str, int] = {}
    for space in sorted(spaces, key=lambda each: (each.num_ids, each.name)):
        if sum(taken.values()) + spec.dense_bytes(space) > most:
            break
        taken[space.name] = spec.dense_bytes(space)
    return taken
