"""The compiled loop for attention against its formula in double precision, and against torch's kernels."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtab.errors import UserError
from embtab.models import attention
from embtab.models.autoint import AutoInt


def by_formula(x, matrices, heads, positive=None):
    """positive: which outputs of each layer a ReLU lets pass, else those that are."""
    for i, (matrix, count) in enumerate(zip(matrices, heads, strict=True)):
        q, k, v, r = (x @ matrix.T).chunk(4, dim=-1)
        parts = zip(*(each.chunk(count, dim=-1) for each in (q, k, v)), strict=True)
        x = torch.cat([(q @ k.mT).softmax(-1) @ v for q, k, v in parts], -1) + r
        x = x * positive[i] if positive else x.relu()
    return x


def drawn(rows, fields, width, layers, seed=0, spread=1.0):
    """Numbers, matrices and heads; layers: (heads, width of a head) each."""
    random = torch.Generator().manual_seed(seed)
    x, matrices = torch.randn(rows, fields, width, generator=random), []
    for heads, each in layers:
        out = heads * each
        matrices.append(spread * torch.randn(4 * out, width, generator=random) / width**0.5)
        width = out
    return x, matrices, [heads for heads, _ in layers]


def check(x, matrices, heads, rtol=2e-5):
    """The answer and all gradients against those in double precision."""
    # What is so near zero that rounding decides its sign may pass in one and not in the other.
    positive = [attention.attend(x, matrices[:i], heads[:i]) > 0 for i in range(1, len(heads) + 1)]
    mine = [each.clone().requires_grad_() for each in (x, *matrices)]
    exact = [each.double().requires_grad_() for each in (x, *matrices)]
    found = attention.attend(mine[0], mine[1:], heads)
    wanted = by_formula(exact[0], exact[1:], heads, positive)
    close(found, wanted, rtol)
    gradient = torch.randn_like(found)
    gradients = torch.autograd.grad(found, mine, gradient)
    for one, other in zip(gradients, torch.autograd.grad(wanted, exact, gradient.double()), strict=True):
        close(one, other, 10 * rtol)


def close(found, wanted, rtol):
    assert found.shape == wanted.shape
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=rtol * max(scale, 1e-3))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    fields=st.integers(1, 45),
    width=st.integers(1, 20),
    layers=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 18)), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(rows, fields, width, layers, seed):
    torch.manual_seed(seed)
    check(*drawn(rows, fields, width, layers, seed))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0], ids=["flat", "as trained", "one field sees one other"])
def test_scores_of_any_size(spread):
    torch.manual_seed(0)
    x, matrices, heads = drawn(33, 9, 8, [(2, 4)], spread=spread)
    check(x, matrices, heads, 1e-4)
    check(x - 20, matrices, heads, 1e-3)


def test_scores_whose_exponentials_overflow_or_vanish():
    x, matrices, heads = drawn(20, 7, 4, [(2, 3)], spread=60.0)
    close(
        attention.attend(x, matrices, heads), by_formula(x.double(), [each.double() for each in matrices], heads), 1e-3
    )


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_what_is_no_number_spoils_its_own_row_only(worst):
    x, matrices, heads = drawn(37, 5, 4, [(2, 3), (1, 4)])
    clean = attention.attend(x, matrices, heads)
    x[3, 2, 1] = worst
    spoilt = attention.attend(x, matrices, heads)
    assert spoilt[3].isnan().any()
    assert torch.equal(spoilt[:3], clean[:3])
    assert torch.equal(spoilt[4:], clean[4:])


def test_threads_give_the_same(monkeypatch):
    x, matrices, heads = drawn(1000, 6, 5, [(2, 4), (2, 3)])
    answers = []
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        given = [each.clone().requires_grad_() for each in (x, *matrices)]
        out = attention.attend(given[0], given[1:], heads)
        answers.append([out, *torch.autograd.grad(out.square().sum(), given)])
    (out, of_x, *of_matrices), (other, of_other, *of_others) = answers
    assert torch.equal(out, other)
    assert torch.equal(of_x, of_other)
    for one, two in zip(of_matrices, of_others, strict=True):  # sums in another order
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_only_what_is_asked_for_has_a_gradient():
    x, matrices, heads = drawn(20, 4, 3, [(1, 4)])
    matrix = matrices[0].requires_grad_()
    out = attention.attend(x, [matrix], heads)
    first = torch.autograd.grad(out.sum(), matrix, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.sum(), matrix)[0])  # nothing kept was changed
    with torch.no_grad():
        again = attention.attend(x, [matrix], heads)
    assert not again.requires_grad
    assert torch.equal(again, out)


def test_what_does_not_fit_is_refused():
    x, matrices, heads = drawn(3, 4, 5, [(2, 3), (1, 4)])
    with pytest.raises(UserError, match=r"\(24, 5\) of 2 heads does not fit vectors of 4 numbers"):
        attention.attend(x[..., :4], matrices, heads)
    with pytest.raises(UserError, match=r"of 5 heads"):
        attention.attend(x, matrices, [5, 1])
    assert not attention.compiled(x, matrices[0].double())


def ranked(model, dense, embeddings):
    embeddings = embeddings.clone().requires_grad_()
    logits = model(dense, embeddings)
    return logits, torch.autograd.grad(logits.sum(), [embeddings, *model.parameters()])


def test_a_ranker_is_the_same_by_torch_and_says_so_where_there_is_no_compiler(monkeypatch):
    torch.manual_seed(0)
    model, dense, embeddings = AutoInt(3, 5, 8, dnn=(6,)), torch.randn(50, 3), torch.randn(50, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, gradients = ranked(model, dense, embeddings)
    monkeypatch.setenv("CXX", "no-such-compiler")
    attention.compiled_loop.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"computed by torch.*attention: there is no C\+\+ compiler 'no-such-comp"):
            others, of_others = ranked(model, dense, embeddings)
    finally:
        attention.compiled_loop.cache_clear()
    torch.testing.assert_close(logits, others)
    for one, other in zip(gradients, of_others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_mixed_precision_leaves_attention_in_float32():
    torch.manual_seed(0)
    model, dense, embeddings = AutoInt(3, 5, 8, dnn=()), torch.randn(50, 3), torch.randn(50, 5, 8)
    seen = []
    model.attention.register_forward_hook(lambda _, inputs, output: seen.append(output))
    exact = model(dense, embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(dense, embeddings)
    assert torch.equal(*seen)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, rtol=0.02, atol=0.02)
