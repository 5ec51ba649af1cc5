"""Whether a table has one feature or two, fbgemm sums and trains the same; which is quicker changes no result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embtab.fused import OPTIMIZERS, FusedOptimizer, Optimizer
from embtab.lookup import fbgemm
from embtab.lookup.base import Request
from embtab.lookup.fbgemm import FbgemmLookup
from embtab.methods import Table

ROWS, WIDTH = 9, 6


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """One row a bag, or ragged bags; weighted or not."""
    lengths = draw(st.none() | st.lists(st.integers(0, 4), max_size=9))
    total = draw(st.integers(0, 9)) if lengths is None else sum(lengths)
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=total, max_size=total))
    weights = draw(st.none() | st.lists(st.floats(-2, 2, width=16), min_size=total, max_size=total))
    return Request(
        WIDTH,
        torch.tensor(rows, dtype=torch.int64),
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        None if weights is None else torch.tensor(weights),
    )


def trained(optimizer: Optimizer, asked: list[Request], dealt: bool) -> tuple[list[Tensor], Tensor, FbgemmLookup]:
    """Answers to requests, before a step of training; the table after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fbgemm, "_loop_is_quicker", lambda: dealt)
        lookup = FbgemmLookup([Table("t", ROWS, WIDTH)], "cpu", FusedOptimizer(optimizer))
    lookup.table("t").copy_(torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH))
    answers = lookup(asked)
    random = torch.Generator().manual_seed(0)
    sum((each * torch.randn(each.shape, generator=random)).sum() for each in answers).backward()
    return [each.detach() for each in answers], lookup.table("t"), lookup


@settings(max_examples=150)
@given(asked=st.lists(requests(), min_size=1, max_size=3), name=st.sampled_from(OPTIMIZERS))
def test_one_feature_or_two(asked: list[Request], name: str) -> None:
    made, table, lookup = trained(Optimizer(name, 0.1), asked, dealt=False)
    dealt, other, shared = trained(Optimizer(name, 0.1), asked, dealt=True)
    for one, two in zip(made, dealt, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(table, other, rtol=1e-5, atol=1e-6)
    assert lookup.state_dict().keys() == shared.state_dict().keys()
    for key, moment in lookup.optimizer_state().items():
        torch.testing.assert_close(moment, shared.optimizer_state()[key], rtol=1e-5, atol=1e-6)


def test_the_choice_is_made_once_and_draws_no_random_number() -> None:
    fbgemm._made_code_waits.cache_clear()
    before = torch.get_rng_state()
    with torch.no_grad():  # as where a bundle is loaded
        found = fbgemm._made_code_waits()
    assert isinstance(found, bool)
    assert torch.equal(before, torch.get_rng_state())
    assert fbgemm._made_code_waits.cache_info().hits == 0
    assert fbgemm._made_code_waits() == found
    assert fbgemm._made_code_waits.cache_info().hits == 1


def test_many_threads_keep_the_code_that_runs_in_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm, "_made_code_waits", lambda: True)
    found = []
    for threads in (1, 4, 5, 64):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        found.append(fbgemm._loop_is_quicker())
    assert found == [True, True, False, False]
