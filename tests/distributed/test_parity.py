"""Any number of processes, any sharding plan: the same losses and the same tables as one process alone."""

from functools import cache
from pathlib import Path

import pytest
import sharded
import torch

pytestmark = pytest.mark.distributed

# Every method by SGD with rows spread out; a few (under slow: all) by the other optimizers and kinds of sharding.
PAIRS = [("sgd", "row_wise")]
KINDS = ["row_wise", "table_wise", "column_wise", "row_wise_ids", "data_parallel"]
MORE = [
    ("adagrad", "table_wise"),
    ("sgd", "column_wise"),
    ("adagrad", "row_wise_ids"),
    ("rowwise_adagrad", "row_wise"),
    ("rowwise_adagrad", "data_parallel"),
    ("adagrad", "data_parallel"),
]
NAMES = [case.name for case in sharded.ALL]
EXACT = [name for name in NAMES if name != "dhe"]  # whose decoder rounds whatever it reads
FEW = ["qr product", "mixed", "cafe soon", "cce soon"]


@cache
def expected(name: str, optimizer: str):
    return sharded.alone(next(case for case in sharded.ALL if case.name == name), optimizer)


@cache
def found(folder: Path):
    """Everything is trained by one set of processes: starting them is what takes time."""
    runs = [(name, optimizer, plan) for name in NAMES for optimizer, plan in PAIRS]
    runs += [(name, optimizer, plan) for name in FEW for optimizer, plan in MORE]
    sharded.spawn(sharded.run_cases, 2, str(folder), runs)
    return torch.load(folder / "found.pt", weights_only=True)


@cache
def exactly_alone(name: str, optimizer: str):
    return sharded.exact_alone(next(case for case in sharded.ALL if case.name == name), optimizer)


@cache
def exactly(folder: Path):
    sharded.spawn(sharded.run_exact, 2, str(folder), [(name, *pair) for name in EXACT for pair in PAIRS])
    return torch.load(folder / "exact.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def check(results: dict, name: str, optimizer: str, plan: str) -> None:
    losses, tables = results[name, optimizer, plan]
    wanted_losses, wanted = expected(name, optimizer)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses), rtol=1e-6, atol=1e-6)
    assert tables.keys() == wanted.keys()
    for key, table in wanted.items():
        apart = (tables[key] - table).abs()
        allowed = 1e-6 + 1e-5 * table.abs() + rounding(table, wanted.get(f"{key}.optimizer"))
        assert (apart <= allowed).all(), (
            f"{name}, {key}: {float(apart.max())} apart, {float((apart - allowed).max())} over"
        )


def rounding(table: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """How far Adagrad carries the order of additions: it divides a gradient, with the rounding of its sum, by the root
    of the second moment. Without one an entry was never trained, and must be the same.
    """
    if moment is None:
        return torch.zeros_like(table)
    root = moment.sqrt().view(len(table), -1).expand_as(table)
    return torch.where(root > 0, sharded.TABLE_LR * 5e-8 / root, 0.0).clamp(max=1e-4)


def check_exactly(results: dict, name: str, optimizer: str, plan: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Where no sum is rounded, the order of sums is nothing: with SGD all is the same bit by bit, bundles too."""
    losses, tables = results[name, optimizer, plan]
    wanted_losses, wanted = exactly_alone(name, optimizer)
    assert tables.keys() == wanted.keys()
    if optimizer != "sgd":  # roots and quotients are rounded, in the last places of numbers of one or two
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses), rtol=0, atol=5e-7)
        for key, table in wanted.items():
            torch.testing.assert_close(tables[key], table, rtol=0, atol=5e-7, msg=lambda m, key=key: f"{key}: {m}")
        return
    assert losses == wanted_losses
    for key, table in wanted.items():
        assert torch.equal(tables[key], table), f"{name}, {plan}, {key}: {float((tables[key] - table).abs().max())}"
    made = []
    for which, state in (("one", wanted), ("many", tables)):
        collection = sharded.exact(next(case for case in sharded.ALL if case.name == name), optimizer).tables
        collection.load_state_dict(state)
        made.append(sharded.bundle(collection, folder / f"{name} {plan} {which}", patch))
    assert made[0] == made[1]


@pytest.mark.parametrize(("optimizer", "plan"), PAIRS)
@pytest.mark.parametrize("name", EXACT)
def test_without_rounding_two_processes_are_one_bit_by_bit(folder, tmp_path, monkeypatch, name, optimizer, plan):
    check_exactly(exactly(folder), name, optimizer, plan, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("plan", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_rounding_any_number_of_processes_is_one(tmp_path, monkeypatch, world_size, plan):
    optimizers = ["sgd", "adagrad", *(["rowwise_adagrad"] if plan != "column_wise" else [])]
    runs = [(name, optimizer, plan) for name in EXACT for optimizer in optimizers]
    sharded.spawn(sharded.run_exact, world_size, str(tmp_path), runs)
    results = torch.load(tmp_path / "exact.pt", weights_only=True)
    for run in runs:
        check_exactly(results, *run, tmp_path, monkeypatch)


@pytest.mark.parametrize(("optimizer", "plan"), PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_every_method_as_one(folder, name, optimizer, plan):
    check(found(folder), name, optimizer, plan)


@pytest.mark.parametrize(("optimizer", "plan"), MORE)
@pytest.mark.parametrize("name", FEW)
def test_every_kind_of_sharding_trains_as_one(folder, name, optimizer, plan):
    check(found(folder), name, optimizer, plan)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "plan"), PAIRS + MORE)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_two_and_four_processes_train_every_method_as_one(tmp_path, world_size, optimizer, plan):
    runs = [(name, optimizer, plan) for name in NAMES]
    sharded.spawn(sharded.run_cases, world_size, str(tmp_path), runs)
    results = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in NAMES:
        check(results, name, optimizer, plan)
