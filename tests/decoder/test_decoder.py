"""The contract is enough: a decoder in C++, written from docs/bundle.md, gives the golden vectors."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import embtab as et
from embtab.reader import Bundle, golden

SOURCE = Path(__file__).with_name("check.cpp")
FEATURES = [
    et.Feature("colour", 3),
    et.Feature("Größe 📏", 40, pooling="mean"),
    et.Feature("item", 1000, id_space="items"),
    et.Feature("seen", 1000, id_space="items", pooling="mean"),
    et.Feature("user", 5000),
]
MIXED = {"colour": "dense", "items": {"name": "qr", "op": "concat"}, "user": "qr", "*": {"name": "qr", "op": "sum"}}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("decoder") / "decoder"
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wall", str(SOURCE), "-o", str(program)], check=True)
    return program


def saved(method: Any, precision: str, path: Path) -> Path:
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, method, "0.3x"), backend="torch", init_std=1.0)
    et.save(tables, path, precision=precision)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("method", ["unified", "hash", MIXED], ids=["unified", "hash", "mixed"])
def test_golden_vectors_come_out(method: Any, precision: str, decoder: Path, tmp_path: Path) -> None:
    path = saved(method, precision, tmp_path / "b")
    done = subprocess.run([str(decoder), str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    expected = golden.read(Bundle(path))
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    sizes = {name: sum(each[key].size for key in golden.OUTPUTS) for name, each in expected.items()}
    assert {name: int(compared) for name, compared, _ in lines} == sizes  # nothing was passed over
    assert max(float(worst) for _, _, worst in lines) < 4e-6


def test_another_vector_is_noticed(decoder: Path, tmp_path: Path) -> None:
    path = saved("unified", "fp32", tmp_path / "b")
    file = path / golden.FILE
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content)
    assert subprocess.run([str(decoder), str(path)], capture_output=True, check=False).returncode == 1


def test_the_decoder_is_short() -> None:
    assert len(SOURCE.with_name("decoder.hpp").read_text().splitlines()) < 200
