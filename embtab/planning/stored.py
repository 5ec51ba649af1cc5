"""The plan of a bundle, as one of ours."""

from __future__ import annotations

from embtab.errors import UserError
from embtab.planning.checks import check_arrays
from embtab.planning.planner import Plan
from embtab.reader import Bundle


def plan_of(opened: Bundle) -> Plan:
    """The plan of a bundle, held to the tables and arrays that lie there.

    Raises:
        UserError: when it claims what cannot be, or comes from a method that this embtab does not have.
    """
    try:
        plan = Plan.from_dict(opened.plan)
        check_arrays(plan.encodings, opened.tables)
    except UserError as error:
        raise UserError(f"{opened.path}: {error}") from None
    return plan
