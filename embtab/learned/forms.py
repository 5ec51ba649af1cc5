"""The shape that a search finds, as a plan: every table in the form that takes the fewest bytes.

A shape is a mask of entries, bool [num_ids, D] per id space. Whatever found it, the bytes are counted on what will be
served: rows, and everything that says where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embtab.features import Feature, id_spaces
from embtab.methods.base import Solution, Spec
from embtab.methods.dense import dense_solution
from embtab.methods.pruned import Pruned, pruned_solution
from embtab.methods.solver import infeasible
from embtab.methods.sparse import FORMS, Sparse, sparse_solution
from embtab.planning import Plan
from embtab.tables import EmbeddingBagCollection

Masks = Mapping[str, np.ndarray]
"""Entries kept, bool [num_ids, D] by id space."""


def smallest(space: Feature, mask: np.ndarray, spec: Spec) -> Solution:
    """The table that gives the kept entries, and zeros elsewhere, in the fewest bytes; the plainest among equals.

    A row may be stored although it is zero, and a zero inside a row: they cost bytes and are counted. Tried are dense
    rows; rows cut to the last column in use; bitmaps and csr; each of the last three for all ids up to the last one
    that keeps anything, and with a bitmap of those that do.

    Args:
        space: the id space.
        mask: bool [num_ids, D].
        spec: dimension and precision.
    """
    rows = np.asarray(mask.any(axis=1))
    kept = int(np.count_nonzero(rows))
    if not kept:
        return pruned_solution(space, 1, 1, None, spec)
    values = int(np.count_nonzero(mask))
    last = int(np.flatnonzero(rows)[-1]) + 1
    width = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
    tried = [dense_solution(space, spec), pruned_solution(space, width, last, None, spec)]
    tried += [sparse_solution(space, form, last, values, False, mask, spec) for form in FORMS]
    if kept < last:
        tried += [pruned_solution(space, width, kept, rows, spec)]
        tried += [sparse_solution(space, form, kept, values, True, mask, spec) for form in FORMS]
    return min(tried, key=lambda one: one.nbytes)


def nbytes_of(spaces: Sequence[Feature], masks: Masks, spec: Spec) -> int:
    """Serving bytes of a shape."""
    return sum(smallest(space, masks[space.name], spec).nbytes for space in spaces)


def plan_of(features: Sequence[Feature], masks: Masks, spec: Spec, budget: int | None) -> Plan:
    """The plan of a shape.

    Args:
        features: in the order of the model's inputs.
        masks: by id space.
        spec: dimension, seed and precision.
        budget: in bytes, which the plan remembers; it is not looked at here.
    """
    solutions = {space.name: smallest(space, masks[space.name], spec) for space in id_spaces(features)}
    encodings = {name: solution.encodings[0] for name, solution in solutions.items()}
    tables = {table.name: table for solution in solutions.values() for table in solution.tables}
    return Plan(tuple(features), encodings, tables, spec.dim, spec.seed, budget)


def largest_within(
    spaces: Sequence[Feature], scores: Mapping[str, np.ndarray], budget: int, spec: Spec, method: str
) -> dict[str, np.ndarray]:
    """The entries of the highest scores, as many as fit into a budget: one threshold for all tables.

    More entries never take fewer bytes, so the threshold is found by bisection on the bytes of what would be served.

    Args:
        spaces: the id spaces.
        scores: float [num_ids, D] by id space; -inf for entries that are never kept, ties are kept or left together.
        budget: serving bytes.
        spec: dimension and precision.
        method: for the error message.

    Raises:
        InfeasibleBudget: when not even tables of zeros fit.
    """

    def above(threshold: float) -> dict[str, np.ndarray]:
        return {name: score > threshold for name, score in scores.items()}

    falling = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[::-1]
    falling = falling[falling > -np.inf]
    nothing = nbytes_of(spaces, above(np.inf), spec)
    if nothing > budget:
        raise infeasible(method, budget, nothing)
    everything = above(-np.inf)
    if nbytes_of(spaces, everything, spec) <= budget:
        return everything
    low, high = 0, len(falling) - 1  # keeping what is above falling[low] fits, above falling[high + 1] does not
    while low < high:
        middle = (low + high + 1) // 2
        fits = nbytes_of(spaces, above(falling[middle]), spec) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return above(falling[low])


@torch.no_grad()
def compacted(plan: Plan, masks: Masks, rows: Mapping[str, Tensor], backend: str = "torch") -> EmbeddingBagCollection:
    """The tables of a shape, filled with the kept entries of dense rows.

    Args:
        plan: from `plan_of`.
        masks: what the plan was made from.
        rows: float32 [num_ids, D] by id space; entries outside the masks are left behind.
        backend: of the result.
    """
    tables = EmbeddingBagCollection(plan, backend=backend)
    for space, encoding in plan.encodings.items():
        target, mask = tables.lookup.table(encoding.tables[0]), torch.from_numpy(masks[space])
        values = rows[space] * mask
        if isinstance(encoding, Sparse):
            values = values[mask].unsqueeze(1)
        elif isinstance(encoding, Pruned):
            has_row = mask.any(1) if encoding.mapped else torch.arange(len(mask)) < encoding.num_rows
            values = values[has_row, : encoding.width]
        target.copy_(values)
    return tables
