"""Adaptive tables in a plain loop: one clear warning where nobody calls adapt()."""

import copy
import warnings

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et

METHODS = [{"name": "cce"}, {"name": "cce", "every": 20}, {"name": "cafe", "every": 20}]
BATCH = KeyedJaggedTensor(["user"], torch.arange(8), lengths=torch.ones(8).int())


def made(method: dict, kind: type = et.EmbeddingBagCollection) -> torch.nn.Module:
    return kind(et.plan([et.Feature("user", 500)], method, "0.5x", 8))


def loop(tables: torch.nn.Module, steps: int, adapt: bool = False) -> list[str]:
    """Trains by a plain loop; gives what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if adapt:
                tables.adapt(step)
            found = tables(BATCH)
            vectors = found["user"] if isinstance(tables, et.EmbeddingBagCollection) else found["user"].values()
            if vectors.requires_grad:
                vectors.sum().backward()
    return [str(each.message) for each in caught if "adapt()" in str(each.message)]


@pytest.mark.parametrize("kind", [et.EmbeddingBagCollection, et.EmbeddingCollection])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loop_without_adapt_is_warned_once(method: dict, kind: type) -> None:
    tables = made(method, kind)
    assert loop(tables, 99) == []
    (message,) = loop(tables, 300)
    assert message.startswith(f"method '{method['name']}' of 'user' reorganises its tables while they train")
    assert "\n" not in message


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loop_with_adapt_is_not_warned(method: dict) -> None:
    tables = made(method)
    assert loop(tables, 130, adapt=True) == []
    assert loop(copy.deepcopy(tables), 130) == []


def test_neither_are_evaluation_and_tables_that_stay_as_they_are() -> None:
    tables = made(METHODS[0])
    with torch.no_grad():
        assert loop(tables, 130) == []
    assert loop(tables.eval(), 130) == []
    assert loop(made({"name": "qr"}), 130) == []
