"""What a method is: three small answers to the same three questions, and a solver for the byte budget.

ids [N] --rows()--> rows [N, K] --lookup--> parts K x [N, W] --combine()--> vectors [N, D]

N ids   K parts per id   W width of a physical row   D dimension the model sees   R rows of a physical table
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from embtab.errors import InfeasibleBudget
from embtab.features import Feature
from embtab.sizes import format_bytes

Array = Any  # a torch.Tensor or a numpy.ndarray
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Table:
    """A physical table: a float32 matrix of `num_rows` x `width`. A lookup backend knows nothing but these."""

    name: str
    num_rows: int
    width: int

    @property
    def nbytes(self) -> int:
        """Serving bytes: the matrix as a bundle stores it, without any padding a training kernel may want."""
        return self.num_rows * self.width * FLOAT_BYTES


@dataclass(frozen=True)
class Encoding(ABC):
    """How the ids of one id space become vectors of `dim` numbers.

    Args:
        dim: D, the width of the composed vector.
        num_ids: ids must lie in [0, num_ids); None where the method takes any int64.
        tables: the names of the K physical tables that the parts of a vector are read from.
    """

    dim: int
    num_ids: int | None
    tables: tuple[str, ...]

    method: ClassVar[str]

    @property
    def linear(self) -> bool:
        """Whether `combine` commutes with a weighted sum over a bag, so that pooled parts may be combined."""
        return True

    @property
    def variant(self) -> tuple:
        """What tells apart two encodings of one method that cannot be computed together, constants aside."""
        return ()

    @abstractmethod
    def constants(self) -> dict[str, tuple[int, ...]]:
        """The integers that `rows` needs, each a tuple with one entry for all parts or one entry per part."""

    @staticmethod
    @abstractmethod
    def rows(ids: Array, c: Mapping[str, Array]) -> Array:
        """int64 [N, K]: the row of each part. Operators only, so that it runs on torch and on NumPy and exports.

        Args:
            ids: int64 [N, 1].
            c: the constants, each int64 [N or 1, K or 1].
        """

    @abstractmethod
    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The vector [..., D] made of K parts, each [..., W]."""

    @abstractmethod
    def part_std(self, std: float) -> float:
        """The standard deviation that independent, zero-mean parts need for composed entries to have `std`."""

    @classmethod
    @abstractmethod
    def solve(cls, spaces: Sequence[Feature], budget: int | None, dim: int, seed: int) -> Solution:
        """The largest tables of this method within `budget` bytes; subclasses may add keyword options.

        Args:
            spaces: one feature per id space; they share the budget.
            budget: serving bytes; None for no limit.
            dim: D.
            seed: the user's seed, for methods that hash.

        Raises:
            InfeasibleBudget: when the smallest form of the method does not fit.
            UserError: for options that make no sense.
        """


class Solution(NamedTuple):
    """Encodings in the order of the id spaces, and the physical tables they read."""

    encodings: list[Encoding]
    tables: list[Table]

    @property
    def nbytes(self) -> int:
        """Serving bytes of the tables."""
        return sum(table.nbytes for table in self.tables)


Choose = Callable[[Feature, int], Solution]


def fill(spaces: Sequence[Feature], budget: int | None, dim: int, method: str, choose: Choose) -> Solution:
    """Shares a budget between id spaces in proportion to their dense bytes, then spends what rounding left over.

    Args:
        spaces: the id spaces.
        budget: bytes; None gives every space its dense bytes.
        dim: D.
        method: for the error message.
        choose: (space, target bytes) -> the largest solution for this one space of at most `target` bytes, or its
            smallest solution if nothing is that small. More target bytes never give a smaller solution.

    Raises:
        InfeasibleBudget: when the smallest solutions together exceed the budget.
    """
    dense = [space.num_ids * dim * FLOAT_BYTES for space in spaces]

    def shared(share: float) -> list[Solution]:
        return [choose(space, int(share * size)) for space, size in zip(spaces, dense, strict=True)]

    if budget is None:
        return _merged(shared(1.0))
    chosen = shared(0.0)
    smallest = sum(one.nbytes for one in chosen)
    if smallest > budget:
        raise infeasible(method, budget, smallest)
    low, high = 0.0, 1.0
    if sum(one.nbytes for one in shared(high)) <= budget:
        return _merged(shared(high))
    for _ in range(60):
        middle = (low + high) / 2
        tried = shared(middle)
        if sum(one.nbytes for one in tried) <= budget:
            low, chosen = middle, tried
        else:
            high = middle
    # Small spaces first: making them exact costs least. Where a large step is left over, large spaces first.
    by_size = sorted(range(len(spaces)), key=lambda i: (dense[i], spaces[i].name))
    first = _topped_up(chosen, by_size, spaces, budget, choose)
    if sum(one.nbytes for one in first) >= 0.9 * budget:
        return _merged(first)
    second = _topped_up(chosen, by_size[::-1], spaces, budget, choose)
    return _merged(max(first, second, key=lambda each: sum(one.nbytes for one in each)))


def _topped_up(
    chosen: Sequence[Solution], order: Sequence[int], spaces: Sequence[Feature], budget: int, choose: Choose
) -> list[Solution]:
    """Offers what is left of the budget to one space after the other."""
    grown = list(chosen)
    left = budget - sum(one.nbytes for one in chosen)
    for i in order:
        larger = choose(spaces[i], grown[i].nbytes + left)
        left -= larger.nbytes - grown[i].nbytes
        grown[i] = larger
    return grown


def _merged(parts: Sequence[Solution]) -> Solution:
    return Solution([e for part in parts for e in part.encodings], [t for part in parts for t in part.tables])


def infeasible(method: str, budget: int, smallest: int) -> InfeasibleBudget:
    """The error for a budget below the smallest size a method can reach."""
    return InfeasibleBudget(
        f"method {method!r} cannot fit into {format_bytes(budget)} ({budget} bytes): its smallest form needs "
        f"{format_bytes(smallest)} ({smallest} bytes); raise the budget or choose a method that compresses further",
        smallest,
    )
