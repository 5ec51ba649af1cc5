"""method="auto": a method and a precision for every feature, from cardinalities, counts and budget alone.

The rule, in the order in which it is applied (configs/README.md has the measurements behind it):

1. Where the dense float32 tables fit, they are taken. Nothing beat them by more than noise.
2. Else rows are served in int8. A row of 16 numbers then takes 20 bytes instead of 64, and three times as many rows
   were worth more than the rounding at every budget, for every method that stores rows.
3. Where the dense tables fit in int8, they are taken.
4. The smallest features stay dense, as long as together they take no more than a tenth of the budget: a gender that
   shares rows with another costs as much quality as a user that does, and saves nothing.
5. What is left is asked whether its share of the budget has a row for each id that matters. The *effective* number of
   ids is the perplexity of their counts: of 100,000 ids by Zipf's law, about 2,000.
   - Enough rows: an id that matters hardly ever meets another one in all its hashed rows, and hashing leaves the rest
     as noise: sums of hashed rows (multihash).
   - Too few: collisions between ids that matter are certain, and codes that keep all ids apart by their structure are
     better than random ones: tensor train. Without counts all ids are taken to matter alike.

Where tensor train is infeasible, hashing is taken; below one row per feature nothing is feasible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embtab.features import Feature
from embtab.methods.base import Spec

SMALL = 0.1
"""Share of the budget that features too small to compress may take."""
ENOUGH = 0.5
"""Rows for each effective id from which on hashing is better than structure."""


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
    for name in ("fp32", "int8") if precision is None else (precision,):
        spec = Spec(dim, precision=name)
        if limit is None or sum(map(spec.dense_bytes, spaces)) <= limit:
            return [Choice(name, {space.name: "dense" for space in spaces})]
    assert limit is not None
    small = _small(spaces, int(SMALL * limit), spec)
    large = [space for space in spaces if space.name not in small]
    share = (limit - sum(small.values())) / sum(map(spec.dense_bytes, large))
    methods = dict.fromkeys(small, "dense")
    structured = {space.name: "tt" for space in large if share * space.num_ids < ENOUGH * effective_ids(space)}
    hashed = {space.name: "multihash" for space in large}
    return [Choice(spec.precision, methods | hashed | structured), Choice(spec.precision, methods | hashed)]


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
