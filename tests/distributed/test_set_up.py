"""What was set before training (a schedule, frozen tables, another learning rate) holds where tables are spread."""

from functools import cache
from pathlib import Path

import pytest
import sharded
import torch

pytestmark = pytest.mark.distributed

KINDS = [("rowwise_adagrad", "row_wise"), ("rowwise_adagrad", "data_parallel"), ("sgd", "row_wise_ids")]
RUNS = [
    (name, optimizer, plan, how)
    for name in ("lowrank", "qr sum")
    for optimizer, plan in KINDS
    for how in ("scheduled", "frozen", "slower")
]


@cache
def found(folder: Path) -> dict:
    sharded.spawn(sharded.run_set_up, 2, str(folder), RUNS)
    return torch.load(folder / "set_up.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("set_up")


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_two_processes_train_as_one(folder: Path, run: tuple[str, str, str, str]) -> None:
    name, optimizer, _, how = run
    losses, tables = found(folder)[run]
    case = next(case for case in sharded.ALL if case.name == name)
    module = sharded.set_up(case, optimizer, how)
    before = {name: module.tables.lookup.table(name).clone() for name in module.tables.plan.tables}
    sharded.fit(module, slice(None))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(module.losses), rtol=1e-5, atol=1e-6)
    for name, table in before.items():
        torch.testing.assert_close(tables[name], module.tables.lookup.table(name), rtol=1e-4, atol=1e-5)
        assert torch.equal(tables[name], table) == (how == "frozen")
