"""A pickle runs what it names. A trap lies in every place where one can stand; nothing that reads may step on it."""

import io
import os
import pickle
import pickletools
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import embtab as et
from embtab import cli
from embtab.convert.dense import read_dense
from embtab.errors import UserError
from embtab.learned.stages import read as read_stage
from embtab.sharding import checkpoint as folders
from embtab.training.checkpoint import description, load_tables, read_checkpoint

PLAN = et.plan([et.Feature("user", 20)], dim=4)


class Trap:
    """Leaves a file when a pickle of it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """The trap, after which nothing must have stepped on it."""
    made = Trap(tmp_path / "sprung")
    yield made
    assert not made.mark.exists()


def content() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(PLAN, backend="torch")
    state = {f"tables.{name}": tensor.detach() for name, tensor in tables.state_dict().items()}
    meta = {"embtab": description(PLAN, {}), "epoch": 0, "global_step": 1, "random_states": [], "shapes": {}}
    return state, meta


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a sharded run."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        folders.save(tmp_path / "run.ckpt", *content())
    finally:
        dist.destroy_process_group()
    return tmp_path / "run.ckpt"


def in_metadata(folder: Path, trap: Trap) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(trap))


def inside_metadata(folder: Path, trap: Trap) -> None:
    """The true description, with one more entry."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"more": trap}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def by_bytes(folder: Path, trap: Trap) -> None:
    """What torch would load as an object, without asking: a part that is no tensor."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    held = io.BytesIO()
    torch.save(trap, held)
    (folder / place.relative_path).write_bytes(held.getvalue())
    place.offset, place.length = 0, len(held.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_meta(folder: Path, trap: Trap) -> None:
    torch.save({"embtab": trap}, folder / "meta.pt")


def in_parts(folder: Path, trap: Trap) -> None:
    for part in folder.glob("*.distcp"):
        held = io.BytesIO()
        torch.save({"tensor": trap}, held)
        part.write_bytes(held.getvalue().ljust(part.stat().st_size, b"\0"))


@pytest.mark.parametrize("place", [in_metadata, inside_metadata, by_bytes, in_meta, in_parts])
def test_a_folder_runs_nothing(place: Callable, folder: Path, trap: Trap, capsys: pytest.CaptureFixture) -> None:
    place(folder, trap)
    for read in (load_tables, folders.read_whole):
        try:
            read(folder)
        except UserError as error:
            assert str(error).startswith(f"{folder}: damaged, or not a checkpoint")
        else:
            assert place is in_meta or place is inside_metadata  # what planners note is not looked at
    if place is not inside_metadata:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["export", str(folder), str(folder.parent / "out")])
        assert stopped.value.code == 2
        assert "damaged, or not a checkpoint" in capsys.readouterr().err


def test_a_folder_as_it_is_gives_its_tables(folder: Path) -> None:
    state, _ = content()
    found = load_tables(folder).state_dict()
    assert all(torch.equal(found[name.removeprefix("tables.")], tensor) for name, tensor in state.items())


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata: Any) -> Any:
    """A table's entry; what collections say of themselves has one dimension."""
    return next(entry for entry in metadata.state_dict_metadata.values() if len(entry.size) == 2)


def place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(first(m), "size", torch.Size([2**40, 2**40])),
        lambda m: setattr(first(m), "size", torch.Size([21, 4])),
        lambda m: setattr(first(m), "size", [20, 4]),
        lambda m: setattr(first(m), "chunks", []),
        lambda m: setattr(first(m).chunks[0], "offsets", torch.Size([1, 0])),
        lambda m: setattr(first(m).chunks[0], "offsets", torch.Size([0])),
        lambda m: setattr(first(m).properties, "dtype", "float32"),
        lambda m: setattr(place(m), "relative_path", "../../../../etc/passwd"),
        lambda m: setattr(place(m), "relative_path", "__9_9.distcp"),
        lambda m: setattr(place(m), "length", 2**40),
        lambda m: setattr(place(m), "length", 1),
        lambda m: setattr(place(m), "offset", -1),
        lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
        lambda m: setattr(m, "storage_data", None),
        lambda m: setattr(m, "state_dict_metadata", {"a": 1}),
        lambda m: setattr(m, "version", None),
    ],
)
def test_what_metadata_claims_is_held_to_the_files(change: Callable, folder: Path) -> None:
    changed(folder, change)
    with pytest.raises(UserError, match=r"run\.ckpt: damaged, or not a checkpoint made by a sharded run"):
        folders.read_whole(folder)


def test_every_instruction_cut_out_of_metadata_is_refused_or_harmless(folder: Path) -> None:
    written = (folder / ".metadata").read_bytes()
    at = [position for _, _, position in pickletools.genops(written)] + [len(written)]
    for start, stop in pairwise(at):
        (folder / ".metadata").write_bytes(written[:start] + written[stop:])
        try:
            folders.read_whole(folder)
        except UserError as error:
            assert "damaged, or not a checkpoint" in str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_file_runs_nothing(zipped: bool, tmp_path: Path, trap: Trap) -> None:
    path = tmp_path / "run.ckpt"
    _, meta = content()
    torch.save({**meta, "callbacks": trap}, path, _use_new_zipfile_serialization=zipped)
    for argv in (["export", str(path), str(tmp_path / "out")], ["test", "--ckpt_path", str(path), "--data.path", "x"]):
        with pytest.raises(SystemExit):
            cli.main(argv)
    for read in (read_checkpoint, load_tables, read_stage):
        with pytest.raises(UserError, match="damaged"):
            read(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npy", ".parquet"])
def test_an_import_runs_nothing(suffix: str, tmp_path: Path, trap: Trap) -> None:
    """By name a file of tensors, by content a pickle; or a NumPy array of objects."""
    path = tmp_path / f"user{suffix}"
    for write in (
        lambda: path.write_bytes(pickle.dumps(trap)),
        lambda: torch.save({"user": trap}, path),
        lambda: np.save(path.open("wb"), np.array([trap], dtype=object), allow_pickle=True),
    ):
        write()
        with pytest.raises(UserError):
            read_dense([path])


class Pickled(pa.ExtensionType):
    """An extension type whose description is a pickle, as Arrow's own Python types were."""

    def __init__(self, trap: Any, storage: pa.DataType) -> None:
        self.trap = trap
        super().__init__(storage, "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps(self.trap)

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Pickled":
        raise AssertionError("this class is not registered")


def test_a_parquet_file_runs_nothing(tmp_path: Path, trap: Trap) -> None:
    """The type of a column may be an extension of Python; Arrow before version 14.0.1 loaded its pickle."""
    ids = pa.array(range(20))
    vectors = pa.array([[0.5] * 4] * 20, pa.list_(pa.float32()))
    evil = pa.ExtensionArray.from_storage(Pickled(trap, pa.int64()), ids)
    pq.write_table(pa.table({"id": evil, "vector": vectors}), tmp_path / "user.parquet")
    kept = pq.read_schema(tmp_path / "user.parquet").field("id").metadata
    assert b"mkdir" in kept[b"ARROW:extension:metadata"]
    assert read_dense([tmp_path / "user.parquet"])["user"].tolist() == [[0.5] * 4] * 20  # as what it is stored as


def test_a_bundle_runs_nothing(tmp_path: Path, trap: Trap) -> None:
    et.save(et.EmbeddingBagCollection(PLAN, backend="torch"), tmp_path / "bundle")
    for name in ("tables.safetensors", "golden.safetensors", "config.json"):
        shutil.copytree(tmp_path / "bundle", tmp_path / name)
        held = (tmp_path / name / name).read_bytes()
        (tmp_path / name / name).write_bytes(pickle.dumps(trap).ljust(len(held), b"\0"))
        with pytest.raises(UserError):
            et.load(tmp_path / name)
        with suppress(UserError):  # which does not look into golden.safetensors
            et.reader.Bundle(tmp_path / name, verify=False)
