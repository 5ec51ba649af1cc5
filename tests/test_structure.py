"""Files whose digests agree and whose fields lie: refused in one line, or read right; never a crash, never for long."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fuzzing.mutations import pick
from fuzzing.structure import bounded, mutate, reseal
from laws import CASES, Case
from numpy.random import Generator
from safetensors.numpy import load_file, save_file

import embtab as et
from embtab.bundle.writer import torch_answers
from embtab.reader import Bundle, golden
from embtab.serving.quantised import QuantisedTables
from embtab.sharding import checkpoint as folders
from embtab.training.checkpoint import description, load_tables

FEW, MANY = 50, 1000
BACKENDS = ("torch", "native")
FEATURES = [
    et.Feature("user", 300),
    et.Feature("item", 200, id_space="items"),
    et.Feature("seen", 200, "mean", None, "items"),
]
KINDS = {case.name: case for case in CASES if case.name != "mixed"}


def tables_of(case: Case, backend: str = "torch") -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return et.EmbeddingBagCollection(case.plan(FEATURES, dim=8), backend=backend, init_std=1.0)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A bundle of every kind of table."""
    root = tmp_path_factory.mktemp("bundles")
    for number, case in enumerate(KINDS.values()):
        et.save(tables_of(case), root / str(number), precision=("fp32", "int8", "int4")[number % 3])
    return [root / str(number) for number in range(len(KINDS))]


def read_everywhere(path: Path) -> None:
    """The reader, and every backend that takes the bundle, give the same vectors."""
    opened = Bundle(path)
    given = golden.inputs(opened.plan)
    expected = golden.reader_answers(opened)(given)
    for backend in BACKENDS:
        live = torch_answers(et.load(path, backend=backend))(given)
        for name, outputs in expected.items():
            for key, vectors in outputs.items():
                np.testing.assert_allclose(live[name][key], vectors, rtol=1e-4, atol=1e-4)
    QuantisedTables(opened)


def spoil_bundle(source: Path, folder: Path, rng: Generator) -> str:
    shutil.copytree(source, folder)
    if rng.random() < 0.8:
        return str(reseal(folder, lambda about: mutate(about["plan"] if rng.random() < 0.8 else about, rng)))
    tensors = load_file(folder / "tables.safetensors")
    name = pick(rng, [n for n, t in tensors.items() if t.dtype.kind in "iu"] or list(tensors))
    held = tensors[name].copy().reshape(-1)
    extremes = [np.iinfo(held.dtype).min, np.iinfo(held.dtype).max] if held.dtype.kind in "iu" else [-9.0, 9.0]
    held[rng.integers(len(held))] = pick(rng, [*extremes, 0, 1, 2])
    tensors[name] = held.reshape(tensors[name].shape)
    save_file(tensors, folder / "tables.safetensors")
    reseal(folder, lambda about: None)
    return f"{name} changed"


def try_bundle(number: int, bundles: list[Path], root: Path) -> None:
    rng = np.random.default_rng([1, number])
    how = spoil_bundle(bundles[number % len(bundles)], root / "bundle", rng)
    with bounded(f"{number}: {list(KINDS)[number % len(bundles)]}: {how}"):
        read_everywhere(root / "bundle")
    shutil.rmtree(root / "bundle")


def try_plan(number: int) -> None:
    rng = np.random.default_rng([2, number])
    case = pick(rng, list(KINDS.values()))
    described = json.loads(json.dumps(case.plan(FEATURES, dim=8).to_dict()))
    how = mutate(described, rng)
    with bounded(f"{number}: {case.name}: {how}"):
        plan = et.Plan.from_dict(described)
        assert et.Plan.from_dict(plan.to_dict()) == plan
        plan.describe()
        assert plan.nbytes == sum(plan.bytes_by_part().values())


def checkpoint_of(case: Case) -> dict[str, Any]:
    tables = tables_of(case)
    state = {f"tables.{name}": value.clone() for name, value in tables.state_dict().items()}
    return {"embtab": description(tables.plan, {"dense": []}), "epoch": 0, "global_step": 1, "state_dict": state}


def odd_tensor(tensor: torch.Tensor, rng: Generator) -> Any:
    return pick(
        rng,
        [
            None,
            "x",
            tensor[:-1] if tensor.dim() else tensor,
            tensor.reshape(-1),
            tensor.double(),
            tensor.bool(),
            tensor.to(torch.complex64),
            tensor.to_sparse(),
            tensor.new_zeros(1).expand(2**40),
            tensor.new_zeros(1).expand(2**20, 2**20),
            tensor.flip(0) if tensor.dim() else tensor,
            torch.full_like(tensor, -1),
            torch.full_like(tensor, 2**7 - 1),
        ],
    )


def try_checkpoint(number: int, root: Path) -> None:
    rng = np.random.default_rng([3, number])
    case = pick(rng, list(KINDS.values()))
    content = checkpoint_of(case)
    if rng.random() < 0.7:
        random = content["embtab"].pop("random_state")
        how = mutate(content["embtab"], rng)
        content["embtab"]["random_state"] = random
    else:
        name = pick(rng, list(content["state_dict"]))
        content["state_dict"][name] = odd_tensor(content["state_dict"][name], rng)
        how = f"{name} is {content['state_dict'][name]!r:.40}" if "expand" not in name else name
    if not saved(content, root / "run.ckpt"):
        return
    for backend in BACKENDS:
        with bounded(f"{number}: {case.name}: {how}"):
            load_tables(root / "run.ckpt", backend)


def saved(content: Any, path: Path) -> bool:
    """Whether torch.save can write it; lists within lists without end are no file."""
    try:
        torch.save(content, path)
    except RecursionError:
        return False
    return True


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    content = checkpoint_of(KINDS["qr product"])
    dist.init_process_group("gloo", f"file://{root / 'meet'}", rank=0, world_size=1)
    try:
        folders.save(root / "run.ckpt", content.pop("state_dict"), {**content, "random_states": [], "shapes": {}})
    finally:
        dist.destroy_process_group()
    return root / "run.ckpt"


def attributes(value: Any) -> list[tuple[Callable[[Any], None], Any]]:
    """Every place in a tree of objects, lists and dicts: what sets it, and what stands there."""
    found: list[tuple[Callable[[Any], None], Any]] = []
    if isinstance(value, dict):
        found += [(lambda new, k=key: value.__setitem__(k, new), each) for key, each in value.items()]
    elif isinstance(value, list):
        found += [(lambda new, k=key: value.__setitem__(k, new), each) for key, each in enumerate(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type | Path):
        found += [(lambda new, k=key: object.__setattr__(value, k, new), each) for key, each in vars(value).items()]
    return found + [place for _, each in list(found) for place in attributes(each)]


def try_sharded(number: int, sharded: Path, root: Path) -> None:
    rng = np.random.default_rng([4, number])
    shutil.copytree(sharded, root / "run.ckpt")
    if rng.random() < 0.3:
        meta = torch.load(root / "run.ckpt" / "meta.pt", weights_only=True)
        random = meta["embtab"].pop("random_state")
        how = mutate(meta, rng)
        if isinstance(meta.get("embtab"), dict):
            meta["embtab"]["random_state"] = random
        saved(meta, root / "run.ckpt" / "meta.pt")
    else:
        metadata = pickle.loads((root / "run.ckpt" / ".metadata").read_bytes())
        places = attributes(metadata)
        put, old = pick(rng, places)
        sizes = [
            torch.Size([]),
            torch.Size([2**40]),
            torch.Size([2**40, 2**40]),
            torch.Size([1, 1]),
            torch.Size([7, 8]),
        ]
        odd = [None, -1, 0, 1, 2**40, 2**62, "x", "../x", [], {}, *sizes, torch.int8, *(each for _, each in places)]
        new = copy.deepcopy(pick(rng, odd))
        put(new)
        how = f"{old!r:.60} is {new!r:.60}"
        with torch.inference_mode():
            (root / "run.ckpt" / ".metadata").write_bytes(pickled(metadata))
    with bounded(f"{number}: {how}"):
        load_tables(root / "run.ckpt")
    shutil.rmtree(root / "run.ckpt")


def pickled(metadata: Any) -> bytes:
    try:
        return pickle.dumps(metadata)
    except Exception:  # what no pickle can say is no file either
        return b""


def test_few_plans() -> None:
    for number in range(4 * FEW):
        try_plan(number)


def test_few_bundles(bundles: list[Path], tmp_path: Path) -> None:
    for number in range(FEW):
        try_bundle(number, bundles, tmp_path)


def test_few_checkpoints(tmp_path: Path) -> None:
    for number in range(FEW):
        try_checkpoint(number, tmp_path)


def test_few_sharded_checkpoints(sharded: Path, tmp_path: Path) -> None:
    for number in range(FEW):
        try_sharded(number, sharded, tmp_path)


@pytest.mark.slow
def test_many_plans() -> None:
    for number in range(10 * MANY):
        try_plan(number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_bundles(part: int, bundles: list[Path], tmp_path: Path) -> None:
    for number in range(part * MANY // 4, (part + 1) * MANY // 4):
        try_bundle(number, bundles, tmp_path)


@pytest.mark.slow
def test_many_checkpoints(tmp_path: Path) -> None:
    for number in range(MANY):
        try_checkpoint(number, tmp_path)


@pytest.mark.slow
def test_many_sharded_checkpoints(sharded: Path, tmp_path: Path) -> None:
    for number in range(MANY):
        try_sharded(number, sharded, tmp_path)
