"""The pages of the public names: they render without a warning, and what they say is so."""

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pdoc
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.datasets import synthetic
from embtab.methods import METHODS

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "docs" / "api"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "embtab|models|datasets|benchmarks|configs|tests|docs|packaging"
WORKED_EXAMPLE = "modulo"
"""The method that CONTRIBUTING.md adds as an example; it is not there."""


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
    page = (ROOT / "docs" / "training.md").read_text()
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


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_the_fifteen_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic.prepare(Path("data/demo"), rows=20_000, scale=0.002)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 15
    names: dict = {}
    exec(example, names)
    assert names["plan"].nbytes <= 400_000
    assert names["trainer"].callback_metrics["test/auc"] > 0.55


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_section_that_names_its_options(method: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    (section,) = re.findall(rf"^## {method}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    options = list(inspect.signature(METHODS[method].solve).parameters)[3:]
    assert [option for option in options if f"`{option}" not in section] == []


def each_page(test: Callable[[Path], None]) -> Callable[[Path], None]:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` as a shell reads it."""
    braces = re.search(r"\{([^}]*)\}", path)
    return [path.replace(braces[0], name) for name in braces[1].split(",")] if braces else [path]


@each_page
def test_paths_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.{{}},-]*[\w}}/]", page.read_text()):
        missing = [one for one in expanded(path) if not (ROOT / one).exists() and WORKED_EXAMPLE not in one]
        assert not missing


@each_page
def test_names_that_a_page_gives_can_be_imported(page: Path) -> None:
    for name in re.findall(r"`(embtab(?:\.\w+)+)[`(]", page.read_text()):
        assert pkgutil.resolve_name(name) is not None


def test_what_the_page_on_the_design_says_is_in_a_file_is_there() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    named = re.findall(r"((?:`\w+`(?:, | and )?)+) (?:in|of) `([\w/]+\.\w+)`", page)
    assert len(named) >= 7
    for names, path in named:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{name} in {path}"
