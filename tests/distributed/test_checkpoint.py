"""Folders that all processes write: what is not one, or is another's, is refused by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embtab.errors import UserError
from embtab.sharding import checkpoint

STATE = {"tables.user": torch.arange(12.0).view(4, 3), "bias": torch.ones(2)}


def never(name: str) -> bool:
    return False


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    meet = tmp_path_factory.mktemp("meet") / "here"
    dist.init_process_group("gloo", f"file://{meet}", rank=0, world_size=1)
    try:
        checkpoint.save(tmp_path / "c.ckpt", STATE, {"epoch": 1})
        yield tmp_path / "c.ckpt"
    finally:
        dist.destroy_process_group()


def test_what_was_saved_comes_back_in_place(folder: Path) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    checkpoint.load(folder, state, never)
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    assert checkpoint.read_meta(folder) == {"epoch": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["c.ckpt"]


def test_tensors_that_it_lacks_are_named_unless_they_may_be_absent(folder: Path) -> None:
    state = {"tables.user": torch.zeros(4, 3), "tables.user.optimizer": torch.full((4,), 7.0)}
    with pytest.raises(UserError, match=r"c\.ckpt: has no 'tables\.user\.optimizer'; it was made with another model"):
        checkpoint.load(folder, state, never)
    checkpoint.load(folder, state, lambda name: name.endswith(".optimizer"))
    assert torch.equal(state["tables.user"], STATE["tables.user"])
    assert torch.equal(state["tables.user.optimizer"], torch.full((4,), 7.0))


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'tables\.user' has shape \[4, 3\] and here \[4, 2\]"):
        checkpoint.load(folder, {"tables.user": torch.zeros(4, 2)}, never)


@pytest.mark.parametrize("read", [checkpoint.read_meta, checkpoint.read_whole])
def test_what_is_no_checkpoint_is_said(read, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    for path in (tmp_path / "empty", folder):
        with pytest.raises(UserError, match=f"{path.name}: damaged, or not a checkpoint"):
            read(path)
