"""What a loss that is not finite is blamed on."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.datasets.reader import Batch
from embtab.training.culprit import culprit, not_finite

NAN = float("nan")


def blamed(dense=None, label=None, vectors=None, weights=None) -> str:
    sparse = KeyedJaggedTensor(["a", "b"], torch.zeros(6, dtype=torch.int64), lengths=torch.ones(6, dtype=torch.int64))
    batch = Batch(torch.zeros(3, 2) if dense is None else dense, sparse, torch.zeros(3) if label is None else label)
    return culprit(batch, ["I1", "I2"], vectors or {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, weights or {})


def at(row: int, value: float, *shape: int) -> torch.Tensor:
    """Zeros but for one row."""
    made = torch.zeros(*shape)
    made[row, ...] = value
    return made


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dense": torch.tensor([[0, 1], [0, 2], [0, NAN]])}, "dense column 'I2' is not finite in row 2"),
        ({"label": at(1, NAN, 3)}, "the label is not finite in row 1"),
        ({"vectors": {"a": torch.zeros(3, 4), "b": at(0, -torch.inf, 3, 4)}}, "feature 'b' is not finite in row 0"),
        ({"vectors": {"a": at(4, NAN, 5, 4)}}, "feature 'a' is not finite"),  # a history: rows are no samples
        ({"weights": {"fine": torch.ones(2), "head.bias": at(0, NAN, 1)}}, "the ranker's head.bias is not finite"),
        ({"dense": torch.tensor([[0, -3e38], [9, 9], [0, 0]])}, "dense column 'I2' holds 3e+38"),
        ({}, "its inputs and weights are finite, and too large"),
    ],
)
def test_the_first_that_is_not_finite_is_named(given: dict, says: str) -> None:
    assert blamed(**given) == says


def test_only_tensors_of_floats_are_looked_at() -> None:
    state = {"text": "nan", "ids": torch.zeros(3, dtype=torch.int64), "none": torch.zeros(0), "rows": torch.zeros(2, 2)}
    assert not_finite(state) is None
    assert not_finite(state | {"last": torch.nn.Parameter(at(1, torch.inf, 2, 2))}) == "last"
