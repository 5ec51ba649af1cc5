"""From features and a byte budget to a plan: each feature's method, its numbers, and the exact bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from embtab.errors import InfeasibleBudget, UserError, shown
from embtab.features import Feature, id_spaces, is_whole
from embtab.hashing import MAX_ROWS
from embtab.methods import PRECISIONS, Encoding, Spec, Table
from embtab.planning.auto import choices
from embtab.planning.budget import grouped, solve
from embtab.planning.checks import MAX_DIM, check_plan, read_encoding, read_feature, read_table
from embtab.planning.specs import MethodSpec, by_feature, named
from embtab.sizes import format_bytes, parse_bytes
from embtab.text import printable


@dataclass(frozen=True)
class Plan:
    """How every feature is encoded, and the exact bytes that serving needs. Made by `plan`, never by hand.

    Args:
        features: in the order of the model's inputs.
        encodings: by id space.
        tables: the physical tables, by name.
        dim: D, the width of every composed vector.
        seed: the user's seed.
        budget: bytes asked for; None if there was no limit.
    """

    features: tuple[Feature, ...]
    encodings: Mapping[str, Encoding]
    tables: Mapping[str, Table]
    dim: int
    seed: int
    budget: int | None

    @property
    def nbytes(self) -> int:
        """Serving bytes: everything needed to produce a vector. Never above the budget."""
        return sum(self.bytes_by_part().values())

    @property
    def dense_nbytes(self) -> int:
        """What the same features would take as dense tables."""
        return _dense_bytes(id_spaces(self.features), self.dim)

    def bytes_by_part(self) -> dict[str, int]:
        """Serving bytes of each physical table, and of each encoding's further arrays as "space.array"."""
        parts = {name: table.nbytes for name, table in self.tables.items()}
        for space, encoding in self.encodings.items():
            parts |= {f"{space}.{name}": array.nbytes for name, array in encoding.arrays().items() if array.serving}
        return parts

    def bytes_by_kind(self) -> dict[str, int]:
        """Serving bytes of all rows, and of each kind of further array (projections, pointers, ...)."""
        kinds = {"rows": sum(table.nbytes for table in self.tables.values())}
        for encoding in self.encodings.values():
            for array in encoding.arrays().values():
                if array.serving:
                    kinds[array.part] = kinds.get(array.part, 0) + array.nbytes
        return {kind: nbytes for kind, nbytes in kinds.items() if nbytes}

    @property
    def precision(self) -> str:
        """That of the rows; "mixed" where tables differ."""
        found = {table.precision for table in self.tables.values()} or {"fp32"}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        trained = sum(table.num_rows * table.width for table in self.tables.values())
        arrays = (array for encoding in self.encodings.values() for array in encoding.arrays().values())
        return trained + sum(math.prod(array.shape) for array in arrays if array.dtype == "float32")

    @property
    def id_spaces(self) -> list[Feature]:
        """One feature per id space, in the order of the features."""
        return id_spaces(self.features)

    def collisions(self) -> dict[str, float]:
        """By id space, how many of its ids cannot be told from another of the same space, in expectation."""
        return {space.name: self.encodings[space.name].colliding(space.num_ids) for space in self.id_spaces}

    @property
    def training_nbytes(self) -> int:
        """Bytes of what only training needs beside tables and optimizer state: the counters of adaptive methods."""
        arrays = (array for encoding in self.encodings.values() for array in encoding.arrays().values())
        return sum(array.nbytes for array in arrays if not array.serving)

    @property
    def digest(self) -> str:
        """Of all that says which rows an id has: trained tables make sense under a plan with the same digest alone.

        Budget, precision and pooling are left out: they change nothing in what tables hold.
        """
        described = self.to_dict()
        spaces = {feature.name: feature.space for feature in self.features}
        tables = sorted((table.name, table.num_rows, table.width) for table in self.tables.values())
        facts = [self.dim, spaces, described["encodings"], tables]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encoding(self, feature: str) -> Encoding:
        """The encoding of a feature, by the feature's name."""
        for known in self.features:
            if known.name == feature:
                return self.encodings[known.space]
        raise UserError(f"no feature {feature!r} in this plan; it has {', '.join(f.name for f in self.features)}")

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """A table for people: features, their methods and numbers, and bytes by physical table."""
        rows = [("feature", "ids", "method", "parts", "rows x width", "bytes")]
        for feature in self.features:
            encoding = self.encodings[feature.space]
            tables = [self.tables[name] for name in dict.fromkeys(encoding.tables)]
            own = [table.nbytes for table in tables if not table.shared]
            own += [array.nbytes for array in encoding.arrays().values() if array.serving]
            size = format_bytes(sum(own)) if own else "shared"
            shape = " + ".join(table.shape for table in tables) or "no table"
            name = printable(feature.name)
            rows.append((name, f"{feature.num_ids}", encoding.method, f"{len(encoding.tables)}", shape, size))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [
            f"{printable(table.name)}: {format_bytes(table.nbytes)}" for table in self.tables.values() if table.shared
        ]
        asked = "no budget" if self.budget is None else f"budget {format_bytes(self.budget)}"
        ratio = self.dense_nbytes / self.nbytes
        lines.append(
            f"total {format_bytes(self.nbytes)} ({self.nbytes} bytes; {asked}), "
            f"{ratio:.3g}x smaller than dense ({format_bytes(self.dense_nbytes)})"
        )
        lines += self._notes()
        if self.training_nbytes:
            lines.append(f"training also keeps counters of {format_bytes(self.training_nbytes)}, which are not served")
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        """What keeps a plan from using its budget, where hashes do: they tell no more than 2^31 - 1 rows apart."""
        full = {table.name for table in self.tables.values() if table.num_rows > MAX_ROWS - 2**16}
        hashing = [space for space, e in self.encodings.items() if e.method != "dense" and full & {*e.tables}]
        unused = 0.0 if self.budget is None else 1 - self.nbytes / self.budget
        if not hashing or unused < 0.01:
            return []
        others = f" (and {len(hashing) - 1} more)" if len(hashing) > 1 else ""
        return [
            f"note: {hashing[0]!r}{others} has as many rows as a hash can tell apart, 2^31 - 1, so {unused:.0%} of the "
            "budget stays unused; wider rows or more tables (dim, fewer chunks, another method) use more"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same plan back (feature counts are left out)."""
        return {
            "dim": self.dim,
            "seed": self.seed,
            "budget": self.budget,
            "features": [
                {"name": f.name, "num_ids": f.num_ids, "pooling": f.pooling, "id_space": f.id_space}
                | ({"hashed": True} if f.hashed else {})
                for f in self.features
            ],
            "encodings": {
                space: {
                    "method": e.method,
                    **{f.name: _plain(getattr(e, f.name)) for f in dataclasses.fields(e) if f.compare},
                }
                for space, e in self.encodings.items()
            },
            "tables": [dataclasses.asdict(table) for table in self.tables.values()],
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` described.

        Raises:
            UserError: when a field is missing, unknown or cannot be, or tables are not as an encoding reads them.
        """
        if not isinstance(described, Mapping):
            raise UserError("not a plan: it is no object")
        try:
            features = tuple(read_feature(entry) for entry in described["features"])
            encodings = {space: read_encoding(space, entry) for space, entry in described["encodings"].items()}
            tables = [read_table(entry) for entry in described["tables"]]
            dim, seed, budget = (described[name] for name in ("dim", "seed", "budget"))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a plan: {error}") from error
        if (
            type(dim) is not int
            or not 1 <= dim <= MAX_DIM
            or type(seed) is not int
            or type(budget) not in (int, NoneType)
        ):
            raise UserError(f"not a plan: dim {shown(dim)}, seed {shown(seed)}, budget {shown(budget)}")
        return _assembled(features, encodings, tables, dim, seed, budget)


def plan(
    features: Sequence[Feature],
    method: MethodSpec = "dense",
    budget: int | float | str | None = None,
    dim: int = 16,
    seed: int = 0,
    precision: str | None = None,
    **options: Any,
) -> Plan:
    """The largest tables of a method that fit into a byte budget.

    Args:
        features: the model's categorical features.
        method: a name from `METHODS`, or "auto", see `embtab.planning.auto`; `{"name": "qr", "op": "sum"}` to set
            options, "precision" among them; or a map from feature names (or id spaces) to a method, with `"*"` for the
            rest: `{"C1": "dense", "*": "qr"}`, or with `{"features": {...}}` around it, whatever features are called.
        budget: serving bytes: 8_000_000, "8MB", "8MiB", "0.1x" (of the dense tables); None for no limit.
        dim: D, the width of every vector.
        seed: changes every hash.
        precision: of the served rows: "fp32" (the default, but "auto" chooses), "fp16", "int8" or "int4" (row-wise
            scale and offset, counted), where `method` names none.
        **options: options of the method, where `method` is a plain name.

    Raises:
        InfeasibleBudget: when the smallest form does not fit; it carries `.min_bytes`.
        UserError: for an unknown method, option or feature, or a budget that is no size.
    """
    spaces = id_spaces(features)
    if not spaces:
        raise UserError("a plan needs at least one feature")
    if not is_whole(dim) or dim < 1:
        raise UserError(f"dim must be a positive whole number, got {dim!r}")
    if not is_whole(seed):
        raise UserError(f"seed must be a whole number, got {seed!r}")
    features, dim, seed = tuple(features), int(dim), int(seed)
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    limit = None if budget is None else parse_bytes(budget, _dense_bytes(spaces, dim))
    if by_feature(method) is None and named(method)[0] == "auto":
        return _auto(features, limit, dim, seed, precision, named(method)[1] | options)
    groups = grouped(spaces, features, method, options, Spec(dim, seed, precision or "fp32"))
    encodings, tables = solve(groups, limit)
    ordered = {space.name: encodings[space.name] for space in spaces}
    _check_hashed(spaces, ordered)
    made = _assembled(tuple(features), ordered, tables, dim, seed, limit)
    if limit is not None and made.nbytes > limit:
        raise AssertionError(f"planned {made.nbytes} bytes for a budget of {limit}; please report this")
    return made


def _check_hashed(spaces: Sequence[Feature], encodings: Mapping[str, Encoding]) -> None:
    for space in spaces:
        encoding = encodings[space.name]
        if space.hashed and encoding.num_ids is not None:
            raise UserError(
                f"feature {space.name!r}: its ids are any 64-bit numbers (hashed), and {encoding.method!r} needs ids "
                "numbered from 0; choose hash, unified, multihash, robe, cafe or dhe for it, or prepare the data "
                "with a vocabulary"
            )


def _auto(
    features: Sequence[Feature], limit: int | None, dim: int, seed: int, precision: str | None, options: dict[str, Any]
) -> Plan:
    """The first choice of the rule that is feasible."""
    precision = options.pop("precision", precision)
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"method 'auto': unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if options:
        raise UserError(f"method 'auto' has no option {next(iter(options))!r}; it chooses methods and their options")
    *first, last = choices(id_spaces(features), limit, dim, precision)
    for choice in first:
        try:
            return plan(features, {"features": choice}, limit, dim, seed)
        except InfeasibleBudget:
            continue
    return plan(features, {"features": last}, limit, dim, seed)


def _dense_bytes(spaces: Sequence[Feature], dim: int) -> int:
    return Spec(dim).dense_bytes_of(spaces)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _assembled(
    features: tuple[Feature, ...],
    encodings: Mapping[str, Encoding],
    tables: Sequence[Table],
    dim: int,
    seed: int,
    budget: int | None,
) -> Plan:
    """A plan whose encodings read only tables that are there, each named once."""
    by_name = {table.name: table for table in tables}
    if len(by_name) != len(tables):
        names = [table.name for table in tables]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two physical tables would be called {shown(twice)}; rename the feature")
    for space, encoding in encodings.items():
        for name in encoding.tables:
            if name not in by_name:
                raise UserError(f"feature {shown(space)} reads a table {shown(name)} that the plan does not have")
    check_plan(features, encodings, by_name, dim)
    for space, encoding in encodings.items():
        for name in encoding.arrays():
            if f"{space}.{name}" in by_name:
                raise UserError(
                    f"feature {shown(space)} has an array {shown(name)}, so no table may be called {space[:60]}.{name}"
                )
    return Plan(features, dict(encodings), by_name, dim, seed, budget)
