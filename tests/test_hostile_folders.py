"""Descriptions whose digests agree and whose fields lie, of datasets, programs and deltas: one short line, or read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing.structure import bounded, mutate, reseal
from laws import CASES
from test_structure import tables_of
from toy import write_toy

import embtab as et
from embtab.bundle.delta_writer import save_delta
from embtab.datasets.check import check
from embtab.datasets.drift import drift_line
from embtab.datasets.schema import Dataset
from embtab.reader import Bundle
from embtab.serving import exported
from embtab.serving.program import Program
from embtab.serving.tables import ServedTables

FEW, MANY = 50, 1000
LINE = 400  # characters of a message, the path of the test's folder left out
HASH = next(case for case in CASES if case.name == "hash")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prepared dataset, an exported program and a delta."""
    root = tmp_path_factory.mktemp("f")
    write_toy(root / "dataset", rows={"train": 40, "valid": 20, "test": 20})
    tables = tables_of(HASH)
    et.save(tables, root / "base")
    opened = Bundle(root / "base")
    pytest.importorskip("onnxruntime")
    exported.export(ServedTables(opened), opened, root / "program", "onnx")
    torch.manual_seed(1)
    later = et.EmbeddingBagCollection(tables.plan, backend="torch", init_std=1.0)
    save_delta(later, root / "delta", [root / "base"])
    return {name: root / name for name in ("dataset", "program", "base", "delta")}


def read_dataset(path: Path) -> None:
    Dataset.load(path)
    et.read_features(path)
    for problem in check(path):
        assert len(str(problem)) < 2 * LINE
    drift_line(path, "valid")


def read_program(path: Path) -> None:
    Program(path, load=False).golden()


def spoil_json(folder: Path, rng: np.random.Generator) -> str:
    about = json.loads((folder / "dataset.json").read_text())
    how = mutate(about, rng)
    (folder / "dataset.json").write_text(json.dumps(about))
    return how


def spoil_signed(folder: Path, rng: np.random.Generator) -> str:
    return str(reseal(folder, lambda about: mutate(about, rng)))


KINDS: dict[str, tuple[Callable[[Path, np.random.Generator], str], Callable[[Path], Any]]] = {
    "dataset": (spoil_json, read_dataset),
    "program": (spoil_signed, read_program),
    "delta": (spoil_signed, Path.exists),
}


def try_folder(kind: str, number: int, folders: dict[str, Path], root: Path) -> None:
    spoil, read = KINDS[kind]
    base = folders["base"]
    rng = np.random.default_rng([5, number])
    target = root / kind
    shutil.copytree(folders[kind], target)
    how = spoil(target, rng)
    with bounded(f"{number}: {how}", LINE + len(str(root))):
        read(target) if kind != "delta" else Bundle(base, deltas=[target])
    shutil.rmtree(target)


@pytest.mark.parametrize("kind", KINDS)
def test_few_folders(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for number in range(FEW):
        try_folder(kind, number, folders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_folders(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for number in range(MANY):
        try_folder(kind, number, folders, tmp_path)
