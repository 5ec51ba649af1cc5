"""The import contracts of pyproject.toml hold the wings to their floors: planted breaches are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BREACHES = {
    "up": ("methods/qr.py", "from embtab.tables.blocks import per_bag", "Wings lie on floors"),
    "a circle": ("tables/dedup.py", "from embtab.tables.collections import Asked", "No package imports in a circle"),
    "torch in the reader": ("reader/packed_rows.py", "import torch", "NumPy alone reads bundles"),
    "a method in a lookup": ("lookup/stacked.py", "from embtab.methods.qr import QR", "Lookups know no method"),
    "a table in a model": ("models/autoint.py", "from embtab.fused import Optimizer", "Models know no table"),
}


def contracts(folder: Path) -> str:
    """What import-linter says of the packages in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "embtab", folder / "embtab", ignore=ignored)
    for wing in ("models", "datasets"):
        shutil.copytree(ROOT / wing, folder / "embtab" / wing, ignore=ignored)
    return folder


@pytest.mark.parametrize("name", BREACHES)
def test_a_planted_breach_is_found(name: str, house: Path) -> None:
    file, line, contract = BREACHES[name]
    path = house / "embtab" / file
    whole = path.read_text()
    path.write_text(
        whole.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{line}\n", 1)
    )
    try:
        said = contracts(house)
    finally:
        path.write_text(whole)
    assert any(contract in row and "BROKEN" in row for row in said.splitlines()), said


def test_no_file_is_long_and_the_top_floor_is_small() -> None:
    lengths = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for wing in ("embtab", "models", "datasets")
        for path in (ROOT / wing).rglob("*.py")
    }
    assert max(lengths.values()) <= 350, max(lengths, key=lambda name: lengths[name])
    assert len(list((ROOT / "embtab").glob("*.py"))) <= 16
