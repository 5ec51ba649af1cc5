"""The sharding plan for devices that are not there."""

from __future__ import annotations

from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.planning import Plan
from embtab.sharding.modules import torchrec_modules
from embtab.sharding.placement import describe, kinds, placed, sharding_plan
from embtab.sharding.strategy import slots
from embtab.sizes import parse_bytes


def describe_shards(
    plan: Plan, devices: int, memory: str, asked: str = "auto", optimizer: str = "rowwise_adagrad"
) -> str:
    """For people: how the tables of a plan would be spread over GPUs, and the training bytes on each.

    Args:
        plan: of the tables.
        devices: number of GPUs, eight to a host.
        memory: of each, such as "80GB".
        asked: as `plan` of `TorchRecStrategy`.
        optimizer: of the tables.

    Raises:
        UserError: when they do not fit, or an argument makes no sense.
    """
    if devices < 1:
        raise UserError(f"--shards must be at least 1, got {devices}")
    tables, trained_by, limit = list(plan.tables.values()), Optimizer(optimizer), parse_bytes(memory)
    chosen = kinds(tables, asked, trained_by)
    modules = torchrec_modules(tables, chosen, *slots(plan))
    made = sharding_plan(modules, tables, chosen, devices, "cuda", trained_by, limit) if modules else None
    found = placed(tables, made, chosen, devices, trained_by)
    fullest = max(sum(sizes) for sizes in zip(*(one.bytes_on for one in found), strict=True)) if found else 0
    if fullest > limit:
        raise UserError(
            f"the fullest device would hold {fullest} bytes of {limit}; use more devices, a smaller budget, or "
            "--sharding row_wise, which also spreads the small tables that every device would have"
        )
    return describe(found, limit)
