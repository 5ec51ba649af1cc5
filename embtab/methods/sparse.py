"""Sparse rows: single entries are kept, the others are zero and not stored.

The form that unstructured pruning ends in: PEP (Liu et al., ICLR 2021, arXiv 2101.07577), DNIS / AutoSrh (Cheng et al.,
arXiv 2006.04466) and magnitude pruning. The V kept values are a table of width 1, in the order of rows and columns, and
an entry of a vector is a part of its own: D parts, each there or not. Two forms say where values belong:

    bitmap   a bit per entry, and how many values come before every 64 of them: 12 bytes per 64 entries
    csr      per row where its values start (int32), per value its column (uint8, int16 beyond 256 columns)

so that of a table that is "90 % sparse" 15 to 25 % of the bytes are left, not 10. csr is the smaller one for wide, very
sparse rows: below about 0.19 D - 4 values a row. Ids without any value take no row where a bitmap of ids (or their
order: the last ones) says so, which `embtab.learned.forms` tries as well; it takes the smallest of all.

Without a search, entries are kept at random (by the seed), as many as fit: the static sparse baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS
from embtab.methods import bitmap as bitmaps
from embtab.methods.base import Array, Encoding, PartInit, Solution, Spec, require
from embtab.methods.dense import dense_solution
from embtab.methods.solver import fill
from embtab.methods.storage import ArraySpec

FORMS = ("bitmap", "csr")


@dataclass(frozen=True)
class Sparse(Encoding):
    """A part per entry.

    Args:
        form: "bitmap" or "csr".
        num_rows: ids that have a row, though it may be empty.
        num_values: V, the entries kept.
        mapped: whether a bitmap says which ids have a row; else the first `num_rows` do.
        mask: bool [num_ids, D], the entries kept. Without it, as in a plan that was read from a file, they are drawn at
            random (from the first `num_rows` ids, or ids drawn at random, if mapped) until a state is loaded.
    """

    form: str
    num_rows: int
    num_values: int
    mapped: bool
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)

    method: ClassVar[str] = "sparse"

    @property
    def may_skip(self) -> bool:
        """An entry may be zero."""
        return True

    def arrays(self) -> dict[str, ArraySpec]:
        """What says where the values belong."""
        arrays = bitmaps.specs(self.bounded_ids, "row_", "row map") if self.mapped else {}
        if self.form == "bitmap":
            return arrays | bitmaps.specs(self.num_rows * self.dim, "", "sparse indices")
        return arrays | {
            "first": ArraySpec((self.num_rows + 1,), "int32", part="sparse indices"),
            "columns": ArraySpec((self.num_values,), column_type(self.dim), part="sparse indices"),
        }

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """Bitmaps, or row starts and columns, of the mask."""
        if self.mask is not None:
            rows = np.asarray(self.mask.any(axis=1) if self.mapped else np.arange(self.bounded_ids) < self.num_rows)
            mask = self.mask[rows]
        else:
            rows = bitmaps.some(self.bounded_ids, self.num_rows, generator)
            mask = bitmaps.some(self.num_rows * self.dim, self.num_values, generator).reshape(-1, self.dim)
        if name in ("row_bits", "row_starts"):
            return bitmaps.bitmap(rows)[name == "row_starts"]
        if name in ("bits", "starts"):
            return bitmaps.bitmap(mask.ravel())[name == "starts"]
        if name == "columns":
            return np.nonzero(mask)[1].astype(column_type(self.dim))
        return np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)

    def check(self) -> None:
        """No more rows than ids, no more values than entries."""
        require(self.form in FORMS, f"form is {self.form!r}")
        require(1 <= self.num_rows <= self.bounded_ids, f"{self.num_rows} rows of {self.num_ids} ids")
        entries = self.num_rows * self.dim
        require(1 <= self.num_values <= entries, f"{self.num_values} values of {entries} entries")
        require(len({*self.tables}) == 1, "entries read more than one table of values")
        require(self.dim <= 2**15, f"columns of {self.dim} numbers")

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """What says where values belong knows as many as there are."""
        if self.mapped:
            bitmaps.check(arrays["row_bits"], arrays["row_starts"], self.bounded_ids, self.num_rows)
        if self.form == "bitmap":
            bitmaps.check(arrays["bits"], arrays["starts"], self.num_rows * self.dim, self.num_values)
            return
        first, columns = arrays["first"], arrays["columns"]
        rising = first[0] == 0 and first[-1] == self.num_values and not (np.diff(first) < 0).any()
        require(rising, f"the starts of rows do not rise from 0 to {self.num_values}")
        require(columns.min() >= 0 and columns.max() < self.dim, f"a column beyond {self.dim}")

    def shapes(self) -> Sequence[tuple[int, int]]:
        """A value per entry that is kept."""
        return [(self.num_values, 1)] * self.dim

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The column of each part, and the numbers of rows and columns."""
        return {"column": tuple(range(self.dim)), "dim": (self.dim,), "num_rows": (self.num_rows,)}

    @staticmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The place of each entry's value, or -1 where it is zero."""
        if "row_bits" in c:
            row = bitmaps.locate(c["row_bits"], c["row_starts"], ids)
        else:
            row = (ids + 1) * (ids < c["num_rows"]) - 1
        there = row >= 0
        row = row * there
        if "columns" in c:
            return (_value_of(row, c) + 1) * there - 1
        return (bitmaps.locate(c["bits"], c["starts"], row * c["dim"] + c["column"]) + 1) * there - 1

    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The entries side by side."""
        return torch.cat(tuple(parts), dim=-1)

    def start(self, std: float) -> Sequence[PartInit]:
        """Wider than asked for by the share of entries that are there, as the others are zero."""
        wider = math.sqrt(self.bounded_ids * self.dim / self.num_values)
        return [PartInit(0.0, std * wider)] * self.dim

    @classmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec, *, form: str | None = None) -> Solution:
        """As many entries as fit, drawn by the seed; spaces that would not shrink stay dense.

        Args:
            spaces: the id spaces.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.
            form: "bitmap" or "csr"; None for the one that leaves more values.

        Raises:
            InfeasibleBudget: when what says where values belong does not fit.
            UserError: for an unknown form.
        """
        if form is not None and form not in FORMS:
            raise UserError(f"sparse: form must be one of {', '.join(FORMS)}; got {form!r}")

        def choose(space: Feature, target: int) -> Solution:
            dense = dense_solution(space, spec)
            if target >= dense.nbytes:
                return dense
            tried = [_largest(space, each, target, spec) for each in FORMS if form in (None, each)]
            fitting = [one for one in tried if one.nbytes <= target]
            if fitting:
                return max(fitting, key=lambda one: one.tables[0].num_rows)
            return min([*tried, dense], key=lambda one: one.nbytes)

        return fill(spaces, budget, spec, cls.method, choose)


def _value_of(row: Array, c: Mapping[str, Array]) -> Array:
    """Of csr rows [..., 1]: the place of the value in each column [..., D], or -1."""
    first, end = c["first"][row], c["first"][row + 1]
    found = row * 0 + c["column"] * 0
    for k in range(c["column"].shape[-1]):
        at = (first + k + row * 0) * (first + k < end)
        found = found + (at + 1) * ((c["columns"][at] == c["column"]) & (first + k < end))
    return found - 1


def _largest(space: Feature, form: str, target: int, spec: Spec) -> Solution:
    """The most values of one form within `target` bytes, and at least one."""
    empty = sparse_solution(space, form, space.num_ids, 0, False, None, spec).nbytes
    each = spec.row_bytes(1) + (0 if form == "bitmap" else np.dtype(column_type(spec.dim)).itemsize)
    most = min(space.num_ids * spec.dim, MAX_ROWS)
    values = min(max((target - empty) // each, 1), most)
    return sparse_solution(space, form, space.num_ids, values, False, None, spec)


def sparse_solution(
    space: Feature, form: str, num_rows: int, num_values: int, mapped: bool, mask: np.ndarray | None, spec: Spec
) -> Solution:
    """The kept entries of `mask`, bool [num_ids, D], or so many random ones where it is None."""
    encoding = Sparse(spec.dim, space.num_ids, (space.name,) * spec.dim, form, num_rows, num_values, mapped, mask)
    return Solution([encoding], [spec.table(space.name, num_values, 1)])


def column_type(dim: int) -> str:
    """The integer type of a column's number."""
    return "uint8" if dim <= 256 else "int16"
