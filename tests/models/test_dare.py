"""DARE and the two-stage search: the laws of the paper, against loops and NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtab.errors import UserError
from embtab.models import DARE
from embtab.models.events import Events, ranks, top_events

F, D, DA = 3, 4, 2
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def both(lengths: list[int], seed: int = 0) -> tuple[Events, Events]:
    """Representation and attention vectors of the same events."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for dim in (D, DA):
        target = torch.randn(len(lengths), F, dim, generator=generator)
        made.append(Events(target, torch.randn(sum(lengths), F, dim, generator=generator), torch.tensor(lengths)))
    return made[0], made[1]


def dare(**options) -> DARE:
    torch.manual_seed(0)
    return DARE(0, 0, F, D, **{"top_k": 3, "hidden": (5,), **options}).eval()


def none(batch: Events) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(len(batch.lengths), 0), torch.empty(len(batch.lengths), 0, D)


def reference(events: Events, attention: Events, k: int) -> np.ndarray:
    """The published formulas, row by row: semantic and position scores, top k, softmax, weighted sum."""
    rows, start = [], 0
    for b, n in enumerate(events.lengths.tolist()):
        q, keys = attention.target[b].numpy(), attention.history[start : start + n].numpy()
        e = events.history[start : start + n].flatten(1).numpy()
        start += n
        meaning = np.einsum("fd,nfd->n", q[:-1], keys[:, :-1]) / np.sqrt(q[:-1].size)
        scores = meaning + keys[:, -1] @ q[-1] / np.sqrt(q[-1].size)
        best = sorted(range(n), key=lambda i: (-scores[i], -i))[: k or n]
        weights = np.exp(scores[best] - scores[best].max()) if best else np.zeros(0)
        rows.append((weights / weights.sum()) @ e[best] if best else np.zeros(e.shape[1]))
    return np.stack(rows)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 10), st.integers(0, 50))
def test_summary_equals_the_published_formulas(lengths, k, seed):
    events, attention = both(lengths, seed)
    found = dare(top_k=k).summary(events, attention)
    np.testing.assert_allclose(found.numpy(), reference(events, attention, k), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 10), st.integers(0, 1000), st.booleans())
def test_search_finds_the_best_and_of_equals_the_latest(lengths, k, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, sum(lengths)).astype(np.float32) if ties else rng.normal(size=sum(lengths))
    given = torch.tensor(scores), torch.tensor(lengths)
    found, exported = top_events(*given, k).numpy(), (ranks(*given) < k).numpy()
    start = 0
    for n in lengths:
        part = scores[start : start + n]
        best = sorted(range(n), key=lambda i: (-part[i], -i))[:k]
        assert np.flatnonzero(found[start : start + n]).tolist() == sorted(best)
        assert np.flatnonzero(exported[start : start + n]).tolist() == sorted(best)
        start += n


def test_the_choice_of_a_row_does_not_depend_on_the_other_rows():
    scores, lengths = torch.tensor([1.0, 1, 1, 1, 5, 5, 5, 5, 5, 5, 5, 5, 5]), torch.tensor([4, 9])
    together = top_events(scores, lengths, 2)
    assert together[:4].tolist() == top_events(scores[:4], lengths[:1], 2).tolist() == [False, False, True, True]


@pytest.mark.parametrize("k", [6, 7, 1000, 0])
def test_k_of_the_longest_history_or_more_is_full_attention(k):
    events, attention = both([6, 2, 0, 5])
    full = reference(events, attention, 0)
    np.testing.assert_allclose(dare(top_k=k).summary(events, attention).numpy(), full, rtol=1e-4, atol=1e-6)


def test_short_histories_beside_long_ones_weigh_only_their_own_events():
    events, attention = both([2, 9])
    constant = Events(events.target, torch.ones_like(events.history), events.lengths)
    torch.testing.assert_close(dare().summary(constant, attention), torch.ones(2, F * D))  # weights add up to 1
    alone = Events(events.target[:1], events.history[:2], events.lengths[:1])
    alone_attention = Events(attention.target[:1], attention.history[:2], attention.lengths[:1])
    torch.testing.assert_close(dare().summary(events, attention)[:1], dare().summary(alone, alone_attention))


def test_empty_histories_give_zeros_and_no_nan():
    for lengths in ([0, 0], [0, 4]):
        events, attention = both(lengths)
        events.target.requires_grad_()
        attention.target.requires_grad_()
        model = dare().train()
        assert torch.equal(model.summary(events, attention)[0], torch.zeros(F * D))
        loss = model(*none(events), events, attention).sum()
        loss.backward()
        assert loss.isfinite()
        assert events.target.grad.isfinite().all()
        assert attention.target.grad is None or attention.target.grad.isfinite().all()


def test_scale_of_the_scores():
    ones = Events(torch.ones(1, F, 16), torch.ones(1, F, 16), torch.tensor([1]))
    meaning = Events(ones.target, ones.history * torch.tensor([1, 1, 0]).view(F, 1), ones.lengths)
    position = Events(ones.target, ones.history * torch.tensor([0, 0, 1]).view(F, 1), ones.lengths)
    model = DARE(0, 0, F, 16)
    assert model.scores(meaning).item() == pytest.approx(32 / 32**0.5)
    assert model.scores(position).item() == pytest.approx(16 / 16**0.5)
    assert DARE(0, 0, F, 16, has_position=False).scores(ones).item() == pytest.approx(48 / 48**0.5)


def test_gradients_of_attention_and_representation_are_isolated():
    events, attention = both([5, 3])
    tensors = [events.target, events.history, attention.target, attention.history]
    for tensor in tensors:
        tensor.requires_grad_()
    model = dare(top_k=2)
    frozen = Events(attention.target.detach(), attention.history.detach(), attention.lengths)
    model(*none(events), events, frozen).sum().backward()
    assert attention.target.grad is None
    assert attention.history.grad is None
    found = model.search(attention)
    assert torch.equal(events.history.grad.flatten(1).ne(0).any(1), found)  # what was not found learns nothing
    events.target.grad = events.history.grad = None
    constant = Events(events.target.detach(), events.history.detach(), events.lengths)
    model(*none(events), constant, attention).sum().backward()
    assert events.target.grad is None
    assert events.history.grad is None
    assert torch.equal(attention.history.grad.flatten(1).ne(0).any(1), found)


def test_searching_first_changes_nothing():
    events, attention = both([9, 0, 2, 7])
    model = dare()
    found = model.search(attention)
    assert found.sum() == 3 + 0 + 2 + 3
    narrowed = model(*none(events), events.kept(found), attention.kept(found))
    torch.testing.assert_close(narrowed, model(*none(events), events, attention))
    assert model.search(attention.kept(found)).all()


def test_order_of_events_does_not_matter_once_positions_go_with_them():
    events, attention = both([8])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = [Events(e.target, e.history[order], e.lengths) for e in (events, attention)]
    model = dare()
    plain = model(*none(events), events, attention)
    torch.testing.assert_close(model(*none(events), *shuffled), plain)
    stays = attention.history[order].clone()
    stays[:, -1] = attention.history[:, -1]
    moved = Events(attention.target, stays, attention.lengths)
    assert not torch.allclose(model.scores(moved)[order.argsort()], model.scores(attention))


def test_target_awareness_is_linear():
    events, attention = both([6, 4])
    model = dare()
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model(*none(events), events, attention)
    times_target = Events(events.target, events.history * events.target[events.owner], events.lengths)
    torch.testing.assert_close(seen[-1], model.summary(times_target, attention))


def test_attention_of_any_width_and_one_table_for_both():
    events, _ = both([4, 2])
    width = dare().head.norm.num_features
    assert width == 3 * F * D  # whatever the dimension of the attention
    torch.testing.assert_close(dare()(*none(events), events), dare()(*none(events), events, events))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="top_k"):
        DARE(0, 0, 2, 4, top_k=-1)
    with pytest.raises(UserError, match="beside its position"):
        DARE(0, 0, 1, 4)


def test_long_histories_are_scored_alike_with_and_without_gradients():
    _, attention = both([0, 1500, 3, 900])
    model = dare()
    with torch.no_grad():
        found = model.scores(attention)
    assert not torch.equal(found, torch.zeros_like(found))
    torch.testing.assert_close(found, model.scores(attention), rtol=1e-5, atol=1e-5)
