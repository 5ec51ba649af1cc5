"""What a method is: three small answers to the same three questions, and a solver for the byte budget.

ids [N] --rows()--> rows [N, K] --lookup--> parts K x [N, W] --combine()--> vectors [N, D]

N ids   K parts per id   W width of a physical row   D dimension the model sees   R rows of a physical table
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from embtab.errors import UserError
from embtab.features import Feature
from embtab.hashing import MAX_ROWS
from embtab.methods.storage import PRECISIONS, ArraySpec, Table

Array = Any  # a torch.Tensor or a numpy.ndarray


@dataclass(frozen=True)
class Spec:
    """What every solver is given beside features and budget.

    Args:
        dim: D, the width of composed vectors.
        seed: the user's seed, for methods that hash.
        precision: of the rows of every table, a name in PRECISIONS.
    """

    dim: int
    seed: int = 0
    precision: str = "fp32"

    def row_bytes(self, width: int) -> int:
        """Serving bytes of one row."""
        return PRECISIONS[self.precision].row_bytes(width)

    def table(self, name: str, num_rows: int, width: int) -> Table:
        """A table of this precision."""
        return Table(name, num_rows, width, self.precision)

    def dense_bytes(self, space: Feature) -> int:
        """Serving bytes of one row of width D per id."""
        return space.num_ids * self.row_bytes(self.dim)

    def dense_bytes_of(self, spaces: Sequence[Feature]) -> int:
        """Serving bytes of the dense tables of many spaces."""
        return sum(map(self.dense_bytes, spaces))


class PartInit(NamedTuple):
    """Mean and standard deviation of the first values of one part's table."""

    mean: float
    std: float


@dataclass(frozen=True)
class LiveTable:
    """A physical table in training, for a method that reorganises itself; writing to its tensors writes to it.

    Args:
        values: float [R, W], the rows.
        moments: [R] or [R, W], what the optimizer fused into backward remembers of each row; None where it remembers
            nothing or is outside (what an outer optimizer remembers of a row stays with the row).
    """

    values: Tensor
    moments: Tensor | None


def require(condition: Any, what: str) -> None:
    """A check, in `Encoding.check` and `check_arrays`, of what a file claims.

    Raises:
        UserError: with `what`, which the caller leads in with feature and method.
    """
    if not condition:
        raise UserError(what)


def require_hashable(num_rows: int) -> None:
    """The same for a number of rows that ids are hashed to."""
    require(1 <= num_rows <= MAX_ROWS, f"ids cannot be hashed to {num_rows} rows")


JOININGS = ("concat", "sum", "product")
"""Rows side by side in order, their sum, their product: what a lookup may do with them while it reads them."""

ARITHMETICS = ("id", "hash", "quotient", "digit")
"""The ways from an id to a row that a lookup may go itself, given a method's constants in their order:

    id        id
    hash      hash_rows(id, c0, c1)
    quotient  id // c0 * c1 + id * c2
    digit     id // c0 % c1
"""


@dataclass(frozen=True)
class Encoding(ABC):
    """How the ids of one id space become vectors of `dim` numbers.

    Args:
        dim: D, the width of the composed vector.
        num_ids: ids must lie in [0, num_ids); None where the method takes any int64.
        tables: the names of the K physical tables that the parts of a vector are read from. A method without tables
            is given its `rows` [N, K] themselves as its only part.

    Fields of subclasses that do not compare (`field(compare=False)`) are no part of the plan's description: they hold
    what first values are made of, and are absent from a plan that was read from a file.
    """

    dim: int
    num_ids: int | None
    tables: tuple[str, ...]

    method: ClassVar[str]
    adaptive: ClassVar[bool] = False
    """Whether the method reorganises itself while it is trained, by `observe`, `due` and `adapt`."""
    bare: ClassVar[bool] = False
    """Whether a vector is one row of width D as it stands, so that `combine` has nothing to do."""
    arithmetic: ClassVar[str | None] = None
    """What `rows` computes, if it is one of `ARITHMETICS`; there are no arrays then, and no id lacks a part."""

    @property
    def joining(self) -> str | None:
        """How `combine` makes a vector of its rows, if it is one of `JOININGS` and all rows have one width."""
        return "concat" if self.bare else None

    @property
    def linear(self) -> bool:
        """Whether `combine` commutes with a weighted sum over a bag, so that pooled parts may be combined."""
        return True

    @property
    def variant(self) -> tuple:
        """What tells apart two encodings of one method that cannot be computed together, constants aside."""
        return ()

    @property
    def may_skip(self) -> bool:
        """Whether `rows` may give -1, for a part that an id does not have: it reads as zeros and trains nothing."""
        return False

    @abstractmethod
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Rows and width of the table of each part, by the encoding's own numbers; the tables of a plan must be so."""

    def check(self) -> None:
        """Refuses numbers that cannot be, as a file may claim them; called before `shapes`.

        Raises:
            UserError: that says which number, by `require`.
        """
        return None

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuses integer arrays, by name, that lead to rows that are not there.

        Raises:
            UserError: that says which array, by `require`.
        """
        return None

    @property
    def bounded_ids(self) -> int:
        """The number of ids, where the method needs them numbered from 0."""
        require(self.num_ids is not None, "num_ids is missing")
        assert self.num_ids is not None
        return self.num_ids

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays beside the tables, by name. Encodings that have any are computed feature by feature."""
        return {}

    def initial(self, name: str, generator: np.random.Generator) -> np.ndarray:
        """The first values of an integer array of `arrays`; only methods that have one define it."""
        raise NotImplementedError(f"{self.method} has no integer array {name!r}")

    @abstractmethod
    def constants(self) -> dict[str, tuple[int, ...]]:
        """The integers that `rows` needs, each a tuple with one entry for all parts or one entry per part."""

    @staticmethod
    @abstractmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """The row of each part, elementwise. Operators only, so that it runs on torch and on NumPy and exports.

        Args:
            ids: int64 of any shape, as [N, 1].
            c: the constants, whose shapes fit that of the ids, as [N or 1, K or 1], and the integer arrays by name.

        Returns:
            int64 of the shape that ids and constants have together, as [N, K].
        """

    @abstractmethod
    def combine(self, parts: Sequence[Tensor], arrays: Mapping[str, Tensor]) -> Tensor:
        """The vector [..., D] made of K parts, each [..., W], and the trained arrays by name."""

    @abstractmethod
    def start(self, std: float) -> Sequence[PartInit]:
        """How the table of each part starts, so that composed entries have zero mean and standard deviation `std`."""

    def colliding(self, num_ids: int) -> float:
        """How many of `num_ids` ids cannot be told from another, in expectation: all their rows are another's too.

        None, unless a method hashes.
        """
        return 0.0

    def observe(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> None:
        """Takes note, in the integer arrays, of the ids [N] of a batch in training; of nothing by default."""
        return None

    def due(self, step: int, epoch: int | None) -> bool:
        """Whether `adapt` is to run before a step of training.

        Args:
            step: batches trained so far, above zero.
            epoch: epochs trained so far, where the step is the first of an epoch; else None.
        """
        return False

    def adapt(
        self, tables: Mapping[str, LiveTable], arrays: Mapping[str, Tensor], generator: np.random.Generator
    ) -> None:
        """Reorganises tables and arrays in place. Only for adaptive methods.

        Args:
            tables: the physical tables, by name.
            arrays: as of `arrays`, by name.
            generator: the source of every random choice.
        """
        raise NotImplementedError(f"{self.method} does not adapt")

    @classmethod
    @abstractmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, spec: Spec) -> Solution:
        """The largest tables of this method within `budget` bytes; subclasses may add keyword options.

        Args:
            spaces: one feature per id space; they share the budget.
            budget: serving bytes; None for no limit.
            spec: dimension, seed and precision.

        Raises:
            InfeasibleBudget: when the smallest form of the method does not fit.
            UserError: for options that make no sense.
        """


@dataclass(frozen=True)
class Solution:
    """Encodings in the order of the id spaces, and the physical tables they read."""

    encodings: list[Encoding]
    tables: list[Table]

    @property
    def nbytes(self) -> int:
        """Serving bytes of tables and arrays."""
        arrays = sum(a.nbytes for encoding in self.encodings for a in encoding.arrays().values() if a.serving)
        return sum(table.nbytes for table in self.tables) + arrays
