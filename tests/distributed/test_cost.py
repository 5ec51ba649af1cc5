"""What a device holds, by arithmetic: as much as torchrec's planner puts there."""

from itertools import product

import pytest

import embtab as et
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS
from embtab.sharding.cost import device_bytes, slot_traffic
from embtab.sharding.modules import torchrec_modules
from embtab.sharding.placement import KINDS, kinds, placed, sharding_plan
from embtab.sharding.strategy import slots

TABLES, ROWS, WIDTH = 4, 4096, 16


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [pair for pair in product(KINDS, OPTIMIZERS) if pair != ("column_wise", "rowwise_adagrad")],  # it needs whole rows
)
@pytest.mark.parametrize("devices", [2, 4])
def test_the_fullest_device_holds_what_the_planner_gives_it(kind: str, optimizer: str, devices: int) -> None:
    plan = et.plan([et.Feature(f"f{i}", ROWS) for i in range(TABLES)], dim=WIDTH)
    tables, trained_by = list(plan.tables.values()), et.Optimizer(optimizer)
    chosen = kinds(tables, kind, trained_by)
    modules = torchrec_modules(tables, chosen, *slots(plan))
    made = sharding_plan(modules, tables, chosen, devices, "cuda", trained_by, 80 * 10**9) if modules else None
    found = placed(tables, made, chosen, devices, trained_by)
    fullest = max(sum(sizes) for sizes in zip(*(one.bytes_on for one in found), strict=True))
    assert device_bytes(kind, devices, TABLES, ROWS, WIDTH, trained_by) == fullest


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="unknown kind of sharding 'by_luck'; there are"):
        slot_traffic("by_luck", 2, 16, 2, 6, 64)
