"""Groups: the id spaces that one method encodes together, each solved for its part of the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from embtab.errors import InfeasibleBudget, UserError
from embtab.features import Feature
from embtab.methods import METHODS, PRECISIONS, Encoding, Spec, Table
from embtab.methods.base import Solution
from embtab.planning.specs import by_feature, kinds_of, named, options_of, refuse_ambiguous
from embtab.sizes import format_bytes


@dataclass(frozen=True)
class Group:
    """The id spaces that one method, with one set of options, encodes together."""

    name: str
    options: Mapping[str, Any]
    spec: Spec
    spaces: Sequence[Feature]

    def solve(self, budget: int | None) -> Solution:
        """The largest tables within a budget; None for no limit."""
        return METHODS[self.name].solve(self.spaces, budget, self.spec, **self.options)

    @property
    def least(self) -> int:
        """The smallest bytes it can be solved in."""
        try:
            return self.solve(1).nbytes
        except InfeasibleBudget as error:
            return error.min_bytes

    @property
    def most(self) -> int:
        """Bytes beyond which it has no use for more."""
        return self.spec.dense_bytes_of(self.spaces)


def grouped(
    spaces: Sequence[Feature], features: Sequence[Feature], method: Any, options: Mapping[str, Any], spec: Spec
) -> list[Group]:
    """Groups id spaces by method, options and precision.

    Args:
        spaces: one feature per id space.
        features: a map of methods may name any of them.
        method: as `embtab.plan` takes it, but for "auto".
        options: of the method, where one serves all.
        spec: what holds for all; a method may name a precision of its own.

    Raises:
        UserError: for an unknown method, option, precision or feature, or a feature without a method.
    """
    space_of = {feature.name: feature.space for feature in features} | {space.name: space.name for space in spaces}
    chosen_by = by_feature(method)
    if chosen_by is None:
        refuse_ambiguous(method, space_of)
        return [Group(*_read_spec(method, options, spec), spaces)]
    if options:
        raise UserError(f"options {', '.join(options)} need one method; give them inside the map instead")
    unknown = [name for name in chosen_by if name != "*" and name not in space_of]
    if unknown:
        raise UserError(f"method names a feature {unknown[0]!r} that is not there; there are {', '.join(space_of)}")
    chosen = {space_of[name]: own for name, own in chosen_by.items() if name in space_of}
    groups: dict[str, Group] = {}
    for space in spaces:
        if space.name not in chosen and "*" not in chosen_by:
            raise UserError(f"method says nothing of feature {space.name!r}; name it or add '*' for the rest")
        read = _read_spec(chosen.get(space.name, chosen_by.get("*")), {}, spec)
        key = str(read)
        members = groups[key].spaces if key in groups else ()
        groups[key] = Group(*read, (*members, space))
    return list(groups.values())


def _read_spec(method: Any, options: Mapping[str, Any], spec: Spec) -> tuple[str, dict[str, Any], Spec]:
    """A method's name and options, checked against what its solver takes, and the spec with its own precision."""
    method, own = named(method)
    options = {**own, **options}
    if method not in METHODS:
        raise UserError(
            f"unknown method {method!r}; there are {', '.join(METHODS)}, and auto for all features together"
        )
    precision = options.get("precision", spec.precision)
    if precision not in PRECISIONS:
        raise UserError(f"method {method!r}: unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    known = options_of(method)
    chosen = {name: value for name, value in sorted(options.items()) if name != "precision"}
    for name, value in chosen.items():
        if name not in known:
            raise UserError(f"method {method!r} has no option {name!r}; it has {', '.join([*known, 'precision'])}")
        if type(value) not in known[name]:
            raise UserError(f"method {method!r}: option {name} must be {kinds_of(known[name])}, got {value!r}")
    return method, chosen, dataclasses.replace(spec, precision=precision)


def solve(groups: Sequence[Group], limit: int | None) -> tuple[dict[str, Encoding], list[Table]]:
    """Solves every group, all of them within a limit; None for no limit.

    Returns:
        Encodings by id space, and the physical tables, each of a name of its own.

    Raises:
        InfeasibleBudget: when the smallest forms together do not fit.
        UserError: for options that make no sense.
    """
    encodings: dict[str, Encoding] = {}
    tables: list[Table] = []
    for group, solution in zip(groups, _solutions(groups, limit), strict=True):
        solution = _apart(solution, {table.name for table in tables})
        encodings |= zip((space.name for space in group.spaces), solution.encodings, strict=True)
        tables += solution.tables
    return encodings, tables


def _solutions(groups: Sequence[Group], limit: int | None) -> list[Solution]:
    """Solves each group for its part of the budget, in proportion to dense bytes within what it can use."""
    if limit is None or len(groups) == 1:
        return [group.solve(limit) for group in groups]
    least = [group.least for group in groups]
    if sum(least) > limit:
        raise InfeasibleBudget(
            f"the methods together need at least {format_bytes(sum(least))} ({sum(least)} bytes), "
            f"more than the budget of {limit} bytes",
            sum(least),
        )
    most = [group.most for group in groups]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        parts = [max(small, int(middle * large)) for small, large in zip(least, most, strict=True)]
        low, high = (middle, high) if sum(parts) <= limit else (low, middle)
    solutions: list[Solution] = []
    left = limit - sum(least)
    for group, small, large in zip(groups, least, most, strict=True):
        part = max(small, int(low * large))
        # What an earlier group could not use goes to the next.
        solution = group.solve(min(small + left, max(part, small)))
        left -= solution.nbytes - small
        solutions.append(solution)
    for i, group in enumerate(groups):
        larger = group.solve(solutions[i].nbytes + left)
        left -= larger.nbytes - solutions[i].nbytes
        solutions[i] = larger
    return solutions


def _apart(solution: Solution, taken: set[str]) -> Solution:
    """The solution, its shared tables renamed where another group's tables have taken their names."""
    new = {}
    for table in solution.tables:
        if table.shared and table.name in taken:
            new[table.name] = next(name for k in count(2) if (name := f"{table.name}.{k}") not in taken)
    return Solution(
        [dataclasses.replace(e, tables=tuple(new.get(name, name) for name in e.tables)) for e in solution.encodings],
        [dataclasses.replace(table, name=new.get(table.name, table.name)) for table in solution.tables],
    )
