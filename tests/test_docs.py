"""The pages of the public names: they render without a warning, and what they say is so."""

import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import pdoc
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et

TEMPLATES = Path(__file__).parent.parent / "docs" / "api"


def test_every_public_name_has_a_place_on_the_page(tmp_path: Path) -> None:
    pdoc.render.configure(docformat="google", template_directory=TEMPLATES)
    with warnings.catch_warnings(action="error", category=UserWarning):
        pdoc.pdoc("embtab", "embtab.planning", output_directory=tmp_path)
    page = (tmp_path / "embtab.html").read_text()
    assert set(et.__all__) <= set(re.findall(r'<section id="(\w+)">', page))
    assert ">planning</a>" in page  # a submodule that __all__ does not name


def test_the_example_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", et.__doc__ or "", re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["vectors"].shape == (3, 16)
    assert np.all(np.any(names["vectors"] != 0, axis=1))


@pytest.mark.parametrize("module", re.findall(r"`(embtab\.\w+)`", et.__doc__ or ""))
def test_the_modules_that_the_package_names_say_what_they_hold(module: str) -> None:
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("backend", ["fbgemm", "native", "torch"])
def test_the_loop_of_the_page_on_training(backend: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("user", 50)], "hash", "0.5x"), backend)
    model = torch.nn.ModuleDict({"tables": tables, "head": torch.nn.Linear(16, 1)})
    ids = KeyedJaggedTensor(["user"], torch.arange(50), lengths=torch.ones(50, dtype=torch.int64))
    losses: list[float] = []

    def loss_of(model: torch.nn.ModuleDict, batch: KeyedJaggedTensor) -> torch.Tensor:
        loss = (model["head"](model["tables"](batch).values()) - 1).square().mean()
        losses.append(loss.item())
        return loss

    exec(example, {"model": model, "batches": [ids] * 300, "loss_of": loss_of})
    assert losses[-1] < 0.5 * losses[0]
