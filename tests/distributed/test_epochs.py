"""A run that is stopped in mid-epoch goes on with any number of processes as if nothing had happened."""

from itertools import chain
from pathlib import Path

import epochs
import pytest
import sharded
import torch

from embtab.training.checkpoint import load_tables, read_checkpoint
from embtab.training.culprit import not_finite

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what one process without any strategy writes and sees."""
    made = tmp_path_factory.mktemp("epochs")
    epochs.write(made / "data")
    for optimizer in ("sgd", "adagrad", "rowwise_adagrad"):
        seen = epochs.train(made, optimizer, optimizer, "auto", 1)
        torch.save((seen.rows, seen.losses), made / f"{optimizer}-seen0.pt")
    return made


def seen(folder: Path, name: str, world_size: int):
    """By step: the epoch, the rows of all processes in the order of their ranks, and the loss."""
    ranks = [torch.load(folder / f"{name}-seen{rank}.pt", weights_only=True) for rank in range(world_size)]
    steps = [
        (batches[0][0], list(chain.from_iterable(rows for _, rows in batches)))
        for batches in zip(*(rows for rows, _ in ranks), strict=True)
    ]
    assert all(losses == ranks[0][1] for _, losses in ranks)
    return steps, ranks[0][1]


def bundle(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> dict[str, bytes]:
    """The bytes of every file of the bundle of a checkpoint, made at the same moment."""
    return sharded.bundle(load_tables(checkpoint), folder, monkeypatch, precision)


def check(folder: Path, name: str, world_size: int, optimizer: str, steps: slice) -> None:
    """Step by step, the rows and losses of one process."""
    rows, losses = seen(folder, name, world_size)
    wanted_rows, wanted_losses = seen(folder, optimizer, 1)
    assert rows == wanted_rows[steps]
    torch.testing.assert_close(losses, wanted_losses[steps], rtol=1e-6, atol=1e-7)


def check_tables(folder: Path, name: str, optimizer: str) -> None:
    """The tables that one process makes, up to the order of additions in the optimizer's state."""
    tables, expected = (load_tables(folder / f"{each}-end.ckpt").state_dict() for each in (name, optimizer))
    assert tables.keys() == expected.keys()
    for key, table in expected.items():
        torch.testing.assert_close(tables[key], table, rtol=1e-6, atol=1e-6)


def stop(name: str, optimizer: str, plan: str) -> dict:
    return {"name": name, "optimizer": optimizer, "strategy": plan, "steps": epochs.STOP}


def go_on(name: str, optimizer: str, plan: str, checkpoint: Path, **options) -> dict:
    return {"name": name, "optimizer": optimizer, "strategy": plan, "resume": checkpoint, **options}


BEGUN, REST = slice(epochs.STOP), slice(epochs.STOP, None)


def test_one_process_sees_every_row_once_an_epoch(folder):
    steps, _ = seen(folder, "sgd", 1)
    for epoch in (0, 1):
        assert sorted(row for at, rows in steps if at == epoch for row in rows) == list(range(epochs.ROWS))


def test_two_processes_begin_and_one_goes_on(folder, tmp_path, monkeypatch):
    kinds = {"sgd": "row_wise", "adagrad": "table_wise", "rowwise_adagrad": "row_wise"}
    begun = [stop(f"2-{optimizer}", optimizer, kind) for optimizer, kind in kinds.items()]
    begun[0]["pipeline"] = True  # its checkpoint is written while the next batch's ids are away
    whole = {"name": "2-all", "optimizer": "sgd", "strategy": "table_wise", "pipeline": True}
    sharded.spawn(epochs.run, 2, str(folder), [*begun, whole])
    rest = [go_on(f"2-1-{each}", each, "auto", folder / f"2-{each}-mid.ckpt") for each in kinds]
    # What has trained enough is written again at once, under another plan.
    moved = go_on("2-moved", "adagrad", "row_wise", folder / "2-adagrad-mid.ckpt", steps=epochs.STOP)
    sharded.spawn(epochs.run, 1, str(folder), [*rest, moved])
    check(folder, "2-all", 2, "sgd", slice(None))
    for optimizer in kinds:
        check(folder, f"2-{optimizer}", 2, optimizer, BEGUN)
        check(folder, f"2-1-{optimizer}", 1, optimizer, REST)
        check_tables(folder, f"2-1-{optimizer}", optimizer)
    for same in (["sgd-end", "2-all-end"], ["2-adagrad-mid", "2-moved-end"]):
        for precision in ("fp32", "int8"):
            made = [
                bundle(folder / f"{each}.ckpt", tmp_path / precision / each, monkeypatch, precision) for each in same
            ]
            assert made[0] == made[1], f"{same}, {precision}"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 2)])
def test_any_number_of_processes_goes_on(folder, tmp_path, monkeypatch, before, after):
    name = f"{before}-{after}"
    sharded.spawn(epochs.run, before, str(folder), [stop(f"{name}-begun", "sgd", "row_wise")])
    rest = go_on(name, "sgd", "table_wise", folder / f"{name}-begun-mid.ckpt")
    sharded.spawn(epochs.run, after, str(folder), [rest])
    check(folder, f"{name}-begun", before, "sgd", BEGUN)
    check(folder, name, after, "sgd", REST)
    if max(before, after) > 2:  # the sum of three gradients and more depends on their order
        check_tables(folder, name, "sgd")
        return
    made = [bundle(folder / f"{each}-end.ckpt", tmp_path / each, monkeypatch, "fp32") for each in ("sgd", name)]
    assert made[0] == made[1]


@pytest.mark.slow
def test_what_is_not_finite_on_one_process_is_refused_by_all(folder):
    sharded.spawn(epochs.spoil, 2, str(folder))
    for rank in (0, 1):
        name, said = torch.load(folder / f"spoilt-said{rank}.pt", weights_only=True)
        assert said.startswith(f"{name} is not finite after step {epochs.STOP - 1} ")
    assert not_finite(read_checkpoint(folder / "spoilt-end.ckpt")["state_dict"]) is None
