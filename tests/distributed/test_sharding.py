"""Checkpoints of sharded runs, what sharding refuses, and plans for machines that are not there."""

from itertools import product
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist

import embtab as et
from embtab.cli import main
from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.learned.supernet import Gate, Supernet
from embtab.methods import Table
from embtab.sharding import checkpoint as folders
from embtab.sharding.cost import sizes_traffic, slot_traffic
from embtab.sharding.offline import describe_shards
from embtab.sharding.placement import kinds, sharders
from embtab.sharding.strategy import shard
from embtab.training.checkpoint import read_checkpoint

OPTIMIZERS = ["adagrad", "rowwise_adagrad"]


def check_resumed(folder, world_size: int) -> None:
    for optimizer in OPTIMIZERS:
        losses, tables = torch.load(folder / f"{optimizer}.{world_size}.pt", weights_only=True)
        wanted_losses, wanted = sharded.alone(sharded.RESUMED, optimizer)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses[3:]), rtol=1e-6, atol=1e-6)
        assert tables.keys() == wanted.keys()
        assert any(name.endswith(".optimizer") for name in wanted)
        for name, table in wanted.items():
            torch.testing.assert_close(tables[name], table, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_and_one_goes_on_under_another_plan(tmp_path):
    sharded.spawn(sharded.resume_cases, 2, str(tmp_path), "row_wise", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.ckpt" for name in OPTIMIZERS]
    sharded.spawn(sharded.resume_cases, 1, str(tmp_path), "table_wise", False)
    check_resumed(tmp_path, 1)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_and_two_or_four_go_on(tmp_path):
    sharded.spawn(sharded.resume_cases, 2, str(tmp_path), "table_wise", True)
    for world_size, plan in ((2, "auto"), (4, "row_wise")):
        sharded.spawn(sharded.resume_cases, world_size, str(tmp_path), plan, False)
        check_resumed(tmp_path, world_size)


def predicted(kind: str, pooled: bool) -> int:
    """Bytes that two processes send: three features, 16 bags of 2 ids each, width 6, 64 rows."""
    one = slot_traffic(kind, 2, 16, 2, 6, 64, pooled=pooled, parts=2)
    return 3 * one.total + (0 if kind == "data_parallel" else sizes_traffic(2).total)


@pytest.mark.distributed
def test_what_cannot_be_is_refused_on_every_rank(tmp_path):
    sharded.spawn(sharded.refusals, 2, str(tmp_path))
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"seen{rank}.pt", weights_only=True)
        assert seen["kept"], "sharding changed the tables"
        assert seen["answer"] < 1e-6
        asked, answered = seen["order"]
        assert asked != answered, "torchrec kept the order, so this shows nothing"
        assert sorted(asked) == sorted(answered)
        assert "weights of a batch get no gradient" in seen["weights"]
        assert seen["weights"].endswith("but by id they do")
        assert seen["table"] == dict.fromkeys(sharded.KINDS, 0.0)
        assert "ZeroDivisionError" in seen["first"]
        assert "column_wise cuts rows" in seen["columns"]
        assert "ZeroDivisionError" in seen["adapt"]
        assert seen["spoilt"].startswith("it is not finite after step")
        assert 'use backend="fbgemm"' in seen["torch"]
        for plan in ("row_wise", "table_wise", "column_wise", "data_parallel"):
            assert seen[f"drawn {plan}"], f"{plan}: other first values than in one piece"
        assert "hold no rows" in seen["unmade"]
        assert seen["peak"] < 0.75 * sharded.LARGE, "half a table each"
        assert seen["sent"] == {case: predicted(*case) for case in seen["sent"]}
        assert "unwritten" in seen
        assert seen["survives"], "a checkpoint that failed to be written replaced the one before"


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_kill_between_any_two_steps_leaves_a_checkpoint(alone, tmp_path, monkeypatch, kind):
    """A run is killed at the first, second, ... change of names, and then goes on to save once more, killed or not."""

    class Killed(BaseException):
        pass

    def killed_at(step: int, value: int) -> bool:
        left = [step]

        def watched(act):
            def acting(*arguments, **options):
                left[0] -= arguments[0].parent == tmp_path  # not the renaming inside the folder
                if left[0] == 0:
                    raise Killed
                return act(*arguments, **options)

            return acting

        with monkeypatch.context() as patch:
            patch.setattr(folders.os, "rename", watched(folders.os.rename))
            patch.setattr(folders, "_remove", watched(folders._remove))
            try:
                save(value)
            except Killed:
                return True
        return False

    def save(value: int) -> None:
        folders.save(path, {"x": torch.full((3,), value)}, {"value": value, "embtab": entry})

    def saved() -> int:
        content = read_checkpoint(path)
        assert (content["state_dict"]["x"] == content["value"]).all()
        return content["value"]

    entry: dict[str, Any] = {"format": 1, "plan": None, "about": {}}
    path, value, points = tmp_path / "last.ckpt", 0, 0
    for first, second in product(range(1, 5), range(1, 5)):
        folders._remove(folders._old(path))
        folders._remove(path)
        if kind == "folder":
            save(0)
        else:
            torch.save({"state_dict": {"x": torch.zeros(3)}, "value": 0, "embtab": entry}, path)
        last = 0
        for step, value in ((first, 1), (second, 2)):
            killed = killed_at(step, value)
            assert saved() in ((last, value) if killed else (value,))
            last = saved()
            points += killed
    assert points > 12


def test_small_tables_are_replicated_and_names_are_checked():
    tables = [Table("small", 1000, 16), Table("large", 100_000, 16)]
    assert kinds(tables, "auto", Optimizer()) == {"small": "data_parallel", "large": "auto"}
    assert kinds(tables, {"small": "row_wise"}, Optimizer()) == {"small": "row_wise", "large": "auto"}
    with pytest.raises(UserError, match="no table 'medium'; there are small, large"):
        kinds(tables, {"medium": "row_wise"}, Optimizer())
    with pytest.raises(UserError, match="sharding plan: 'rowwise' is none of auto, table_wise"):
        kinds(tables, "rowwise", Optimizer())


def test_sharders_do_not_share_what_torchrec_writes_into():
    first, second = (each.fused_params for each in sharders(Optimizer("sgd", 0.5)))
    assert first == second
    assert first is not second


def test_a_plan_for_devices_that_are_not_there():
    features = [et.Feature("shop", 100), et.Feature("item", 3_000_000), et.Feature("user", 40_000_000)]
    shown = describe_shards(et.plan(features, "dense", dim=32), 4, "4GB")
    rows = {line.split()[0]: line.split() for line in shown.splitlines()}
    assert rows["shop"][4] == "data_parallel"
    assert rows["user"][4] == "row_wise"  # 40M x (32 + 1) x 4 bytes = 5.28 GB do not fit one device
    assert rows["user"][6:] == ["5.28", "GB"]
    assert sum(line.startswith("device ") for line in shown.splitlines()) == 4
    with pytest.raises(UserError, match="do not fit 1 devices"):
        describe_shards(et.plan(features, "dense", dim=32), 1, "4GB")


def test_searching_for_a_shape_is_one_process_work(tmp_path, monkeypatch, capsys):
    supernet = Supernet([et.Feature("item", 1000)], 8, Gate())
    with pytest.raises(UserError, match=r"a Supernet is trained by one process: .* embtab search"):
        shard(supernet, "auto", torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["search", "--config", "absent.yaml", "--out", str(tmp_path / "out")])
    assert "one process: start it without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.ckpt: no such checkpoint"):
        et.TorchRecStrategy().load_checkpoint(tmp_path / "absent.ckpt")
