"""Rows spread over their events and weighted sums of events, with their gradients, against loops and plain torch."""

import pytest
import torch
from torch import Tensor

from embtab.models.events import owner, segment_sum
from embtab.models.segments import spread, weighted_sum

LENGTHS = torch.tensor([3, 0, 1, 4, 0])


def close(mine: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    """Equal values and equal gradients."""
    torch.testing.assert_close(mine, plain)
    gradient = torch.randn(mine.shape)
    found, wanted = (torch.autograd.grad(each, inputs, gradient) for each in (mine, plain))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spread_rows_are_indexed_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    assert spread(rows, LENGTHS, 8)[3].equal(rows[2])
    torch.set_default_dtype(dtype)
    try:
        close(spread(rows, LENGTHS, 8), rows[owner(LENGTHS, 8)], [rows])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("lengths", [LENGTHS, torch.zeros(4, dtype=torch.int64), torch.tensor([2])])
def test_a_weighted_sum_is_the_sum_of_weighted_events(lengths: Tensor) -> None:
    torch.manual_seed(0)
    total = int(lengths.sum())
    values, weights = torch.randn(total, 3, requires_grad=True), torch.randn(total, requires_grad=True)
    close(
        weighted_sum(values, weights, lengths),
        segment_sum(weights.unsqueeze(1) * values, lengths),
        [values, weights],
    )


def test_a_worked_sum() -> None:
    values, weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1.0, -1.0, 2.0])
    assert weighted_sum(values, weights, torch.tensor([2, 0, 1])).tolist() == [[-2, -2], [0, 0], [10, 12]]
