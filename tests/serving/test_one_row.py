"""Compiled programs with a graph of their own for one row: which graph answers, and that both are the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from laws import CASES
from serving.test_programs import checkpoint, exported_model, exported_tables
from serving.test_tables import bundle, largest
from torch import Tensor, nn

import embtab as et
from embtab.errors import UserError
from embtab.reader import Bundle
from embtab.serving import exported, one_row
from embtab.serving.capture import captured
from embtab.serving.program import Program
from embtab.serving.ranker import Ranker
from embtab.serving.tables import ServedTables


class Made(nn.Module):
    """Products with matrices small and large, with a bias and without, of one vector a row and of several."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(50, width)
        self.small = nn.Linear(3 * width, 5, bias=False)
        self.large = nn.Linear(3 * width, one_row.SUMMED // (3 * width) + 1)
        self.each = nn.Linear(width, 2)
        self.register_buffer("shift", torch.tensor(3), persistent=False)

    def inputs(self) -> list[str]:
        return ["ids", "x"]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = self.table((inputs["ids"] + self.shift) % 50)
        flat = vectors.flatten(1) + inputs["x"] * torch.tensor([1.0, 2.0]).sum()
        return {
            "large": self.large(flat).relu().sum(1) + self.small(flat).sigmoid().sum(1),
            "each": self.each(vectors).transpose(1, 2),
            "ids": inputs["ids"],
            "squeezed": flat.sum(1, keepdim=True).squeeze(),  # of one row it has no length
        }


def given(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    return {"ids": torch.randint(0, 1000, (rows, 3)), "x": torch.randn(rows, 1)}


def either(one: nn.Module, more: nn.Module) -> torch.export.ExportedProgram:
    example = given(3)
    first = {name: values[:1] for name, values in example.items()}
    return one_row.beside(captured(more, example), captured(one, first, fixed=True), example)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 50])
def test_one_row_has_a_graph_of_its_own(rows: int) -> None:
    """Two modules of different numbers show which graph it is."""
    one, more = Made(1), Made(2)
    found = either(one, more).module()(given(rows))
    expected = (one if rows == 1 else more)(given(rows))
    assert list(found) == list(expected)
    for name, values in expected.items():
        values = values.reshape(rows, *found[name].shape[1:])
        assert found[name].shape == values.shape, name
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)


def test_constants_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Made(0)
    size = sum(values.nbytes for values in (*module.parameters(), *module.buffers()))
    for packed in (one_row.PACKED, 64):
        monkeypatch.setattr(one_row, "PACKED", packed)
        program = either(module, module)
        held = sum(values.nbytes for values in (*program.state_dict.values(), *program.constants.values()))
        assert size <= held <= size + 20 * one_row.ALIGNED
        found = program.module()(given(1))
        expected = module(given(1))
        assert found["squeezed"].shape == (1,)
        expected["squeezed"] = expected["squeezed"].reshape(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_small_products_of_one_vector_are_sums() -> None:
    left = [node for node in either(Made(0), Made(0)).graph_module.modules() if isinstance(node, torch.fx.GraphModule)]
    products = [sum(n.target == torch.ops.aten.linear.default for n in module.graph.nodes) for module in left]
    assert sorted(products) == [
        0,
        2,
        3,
    ]  # the whole; of one row: the large one, and the one of several vectors; of more


def test_inputs_of_different_lengths_have_one_graph(tmp_path: Path) -> None:
    opened = bundle(next(case for case in CASES if case.name == "hash"), tmp_path / "b")
    by_row = {}
    for stacked in (True, False):
        module = ServedTables(opened, stacked=stacked)
        example = exported.made_inputs(module, 3, np.random.default_rng(0))
        program = captured(module, {name: torch.from_numpy(array) for name, array in example.items()})
        by_row[stacked] = one_row.is_by_row(program)
    assert by_row == {True: True, False: False}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler runs
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_compiled_ranker_answers_any_number_of_rows(precision: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    et.save(exported_tables(source), tmp_path / "b", precision=precision)
    opened = Bundle(tmp_path / "b")
    module = Ranker(opened, exported_model(source), 2, stacked=True)
    exported.export(module, opened, tmp_path / "p", "aoti")
    program = Program(tmp_path / "p")
    inputs = exported.made_inputs(module, 700, np.random.default_rng(0))
    for rows in (1, 700, 0, 1, 2):
        some = {name: array[:rows] for name, array in inputs.items()}
        assert largest(program.run(some), module.expected(opened, some)) < 1e-5
    wrong = {**some, "ids": np.array([[0, 90]]), "dense": some["dense"][:1]}
    with pytest.raises(UserError, match=r"feature 'item': id 90 is outside \[0, 90\)"):
        program.run(wrong)


def test_a_program_that_differs_at_one_row_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundle(next(case for case in CASES if case.name == "hash"), tmp_path / "b")
    module = ServedTables(opened, stacked=True)

    class Wrong:
        FILE = "model.pt2"

        @staticmethod
        def write(module: ServedTables, example: dict[str, Tensor], path: Path) -> None:
            path.write_bytes(b"")

        @staticmethod
        def load(path: Path) -> exported.Run:
            def run(inputs: exported.Arrays) -> exported.Arrays:
                found = exported.outputs_of(module, opened, inputs)["vectors"]
                return {"vectors": found + (len(found) == 1)}

            return run

    monkeypatch.setattr(exported, "kind_of", lambda name: Wrong)
    with pytest.raises(UserError, match="differs from the model by 1; nothing was written"):
        exported.export(module, opened, tmp_path / "p", "aoti")
    assert not (tmp_path / "p").exists()
