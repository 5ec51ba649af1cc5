"""Configurations of `embtab fit` that say what cannot be: one short line, nothing run, no memory eaten."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing.structure import bounded, mutate
from numpy.random import default_rng
from toy import write_toy

from embtab.training.cli import main

FEW, MANY = 20, 1000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "bomb": BOMB,
    "bomb within": BOMB + "trainer: *i\n",
    "deep": "trainer: " + "[" * 20_000,
    "deep map": "trainer: " + "{a: " * 3000,
    "python tag": "trainer: !!python/object/apply:os.system ['touch ran']\n",
    "tag of a class": "trainer: !!python/name:os.system\n",
    "set": "model: !!set {? os.system}\n",
    "binary": "model: !!binary aGVsbG8=\n",
    "merge of itself": "a: &a\n  <<: *a\n",
    "list": "- 1\n",
    "number": "7\n",
    "empty": "",
    "controls": 'trainer: "\\x1b[2J"\n',
    "null byte": "a\0b",
    "other name": "x" * 5000 + ": 1\n",
}


def settings(data: Path) -> dict[str, Any]:
    model = {"class_path": "embtab.models.AutoInt", "init_args": {"attention_dim": 8, "num_layers": 1, "dnn": [16]}}
    return {
        "data": {"path": str(data), "batch_size": 8},
        "model": {"method": "qr", "budget": "0.9x", "dim": 8, "lr": 0.01, "model": model},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    }


def read(path: Path, how: str) -> None:
    with bounded(how, 400 + len(str(path))):
        main(["fit", "--config", str(path)])
    assert sorted(each.name for each in path.parent.iterdir()) == ["config.yaml", "data"], how


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_toy(tmp_path / "data", rows={"train": 40, "valid": 20, "test": 20})
    return tmp_path


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_attacks_is_one_line(name: str, here: Path) -> None:
    (here / "config.yaml").write_text(TEXTS[name])
    read(here / "config.yaml", name)


def unlike(data: Path, seed: int) -> tuple[str, str]:
    """A configuration with one field changed, and how."""
    described = settings(data)
    how = mutate(described, default_rng(seed))
    return yaml.safe_dump(described), how


@pytest.mark.parametrize(
    "seeds", [range(FEW), pytest.param(range(FEW, MANY), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_field_that_is_another_is_one_line_or_runs(seeds: range, here: Path) -> None:
    for seed in seeds:
        text, how = unlike(here / "data", seed)
        (here / "config.yaml").write_text(text)
        with bounded(f"{seed}: {how}", 1500):
            main(["fit", "--config", str(here / "config.yaml")])
