"""Every method at one budget, before anything is trained: bytes by part, parameters, collisions, feasibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embtab.errors import InfeasibleBudget, UserError
from embtab.features import Feature
from embtab.methods import METHODS
from embtab.planning.planner import Plan, plan
from embtab.sizes import format_bytes
from embtab.text import printable


@dataclass(frozen=True)
class Outlook:
    """What a method would take.

    Args:
        method: its name.
        plan: the plan; None where there is none.
        why: why there is none.
    """

    method: str
    plan: Plan | None
    why: str = ""


def outlooks(
    features: Sequence[Feature],
    budget: int | str | None,
    dim: int = 16,
    seed: int = 0,
    precision: str | None = None,
) -> list[Outlook]:
    """Each method's plan, or why it has none.

    Args:
        features: the model's categorical features.
        budget: serving bytes, as in `plan`.
        dim: D, the width of every vector.
        seed: of the hashes.
        precision: of the served rows; None for fp32, and for what auto chooses.

    Raises:
        UserError: for a budget, dim or precision that makes no sense.
    """
    plan(features, "auto", None, dim, seed, precision)  # what is wrong for all is said once
    found = []
    for name in ("auto", *METHODS):
        try:
            found.append(Outlook(name, plan(features, name, budget, dim, seed, precision)))
        except InfeasibleBudget as error:
            found.append(Outlook(name, None, f"infeasible: needs {format_bytes(error.min_bytes)}"))
        except UserError as error:
            found.append(Outlook(name, None, printable(str(error))))
    return found


def describe(found: Sequence[Outlook]) -> str:
    """A table for people, a line per method."""
    lines = [("method", "bytes", "of dense", "parameters", "colliding ids", "bytes by part")]
    for each in found:
        if each.plan is None:
            lines.append((each.method, "-", "-", "-", "-", each.why))
            continue
        made = each.plan
        total = sum(space.num_ids for space in made.id_spaces)
        lost = sum(made.collisions().values())
        parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in made.bytes_by_kind().items())
        lines.append(
            (
                each.method,
                format_bytes(made.nbytes),
                f"{made.nbytes / made.dense_nbytes:.3g}x",
                f"{made.parameters:,}",
                f"{lost:,.0f} ({lost / total:.1%})",
                parts,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
