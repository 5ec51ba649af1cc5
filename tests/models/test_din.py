"""DIN and mean pooling: laws of the paper, against loops over rows in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models import DIN, MeanPool
from embtab.models.din import ActivationUnit
from embtab.models.events import Events, count, owner, padded, segment_softmax, segment_sum
from embtab.models.layers import BatchNorm, Dice, Head

F, D = 2, 3
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def events(lengths: list[int], fields: int = F, dim: int = D, seed: int = 0) -> Events:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(len(lengths), fields, dim, generator=generator)
    history = torch.randn(sum(lengths), fields, dim, generator=generator)
    return Events(target, history, torch.tensor(lengths))


def row(all_events: Events, b: int) -> Events:
    start = int(all_events.lengths[:b].sum())
    n = int(all_events.lengths[b])
    return Events(all_events.target[b : b + 1], all_events.history[start : start + n], all_events.lengths[b : b + 1])


def din(**options) -> DIN:
    torch.manual_seed(0)
    made = DIN(1, 1, F, D, **{"attention": (8, 4), "hidden": (6,), **options})
    for module in made.modules():
        if isinstance(module, Dice):
            nn.init.uniform_(module.alpha)
    return made.eval()


def plain_scores(unit: ActivationUnit, q: Tensor, k: Tensor) -> Tensor:
    q = q.expand_as(k)
    return unit.rest(unit.first(torch.cat([q, k, q - k, q * k], dim=1))).squeeze(-1)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.booleans())
def test_interest_equals_a_loop_over_rows_with_the_plain_unit(lengths, softmax):
    model, batch = din(softmax=softmax), events(lengths)
    found = model.interest(batch)
    for b, n in enumerate(lengths):
        one = row(batch, b)
        weights = plain_scores(model.unit, one.target.flatten(1), one.history.flatten(1))
        if softmax and n:
            weights = torch.softmax(weights / (F * D) ** 0.5, 0)
        torch.testing.assert_close(found[b], weights @ one.history.flatten(1), rtol=1e-5, atol=1e-6)


def test_folded_unit_has_the_gradients_of_the_plain_one():
    batch = events([3, 0, 2])
    grads = []
    for plain in (True, False):
        model = din()
        if plain:
            q = batch.target.flatten(1)[batch.owner]
            scores = plain_scores(model.unit, q, batch.history.flatten(1))
        else:
            scores = model.scores(batch)
        scores.square().sum().backward()
        grads.append(model.unit.first.weight.grad)
    torch.testing.assert_close(*grads)


@settings(max_examples=25, deadline=None)
@given(LENGTHS)
def test_doubled_histories_double_the_interest_without_softmax_and_keep_it_with(lengths):
    batch = events(lengths)
    twice = Events(
        batch.target,
        torch.cat([torch.cat([row(batch, b).history] * 2) for b in range(len(lengths))]),
        batch.lengths * 2,
    )
    torch.testing.assert_close(din().interest(twice), 2 * din().interest(batch), rtol=1e-5, atol=1e-6)
    soft = din(softmax=True)
    torch.testing.assert_close(soft.interest(twice), soft.interest(batch), rtol=1e-5, atol=1e-6)
    mean = MeanPool(1, 1, F, D).eval()
    dense, others = torch.zeros(len(lengths), 1), torch.zeros(len(lengths), 1, D)
    torch.testing.assert_close(mean(dense, others, twice), mean(dense, others, batch))


@pytest.mark.parametrize("model", [din(), din(softmax=True), MeanPool(1, 1, F, D).eval()])
def test_each_row_is_scored_as_if_alone_and_empty_ones_are_fine(model):
    lengths = [4, 0, 1, 6]
    batch = events(lengths)
    dense, others = torch.randn(4, 1), torch.randn(4, 1, D)
    together = model(dense, others, batch)
    alone = [model(dense[b : b + 1], others[b : b + 1], row(batch, b)) for b in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.isfinite().all()


@pytest.mark.parametrize("softmax", [False, True])
def test_fully_empty_histories_give_zeros_and_no_nan(softmax):
    model, batch = din(softmax=softmax).train(), events([0, 0, 0])
    batch.target.requires_grad_()
    interest = model.interest(batch)
    assert torch.equal(interest, torch.zeros(3, F * D))
    loss = model(torch.zeros(3, 1), torch.zeros(3, 1, D), batch).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*model.parameters(), batch.target])


def test_mean_pooling_against_numbers():
    batch = Events(torch.zeros(2, 1, 1), torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1), torch.tensor([3, 0]))
    model = MeanPool(0, 0, 1, 1)
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model.eval()(torch.empty(2, 0), torch.empty(2, 0, 1), batch)
    assert seen[2].tolist() == [[3.0], [0.0]]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 100))
def test_segments_against_loops(lengths, seed):
    torch.manual_seed(seed)
    sizes = torch.tensor(lengths)
    values = torch.randn(sum(lengths), 2)
    parts = values.split(lengths)
    torch.testing.assert_close(segment_sum(values, sizes), torch.stack([part.sum(0) for part in parts]))
    soft = segment_softmax(values[:, 0] * 50, sizes)
    torch.testing.assert_close(soft, torch.cat([torch.softmax(part[:, 0] * 50, 0) for part in parts]))
    assert owner(sizes, sum(lengths)).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    mask = values[:, 0] > 0
    assert count(mask, sizes).tolist() == [int(part.sum()) for part in mask.split(lengths)]
    filled = padded(values[:, 0], sizes, -7.0)
    assert filled.shape == (len(lengths), max(lengths))
    for line, part in zip(filled, parts, strict=True):
        assert line.tolist() == part[:, 0].tolist() + [-7.0] * (max(lengths) - len(part))


def test_dice():
    dice = Dice(3)
    s = torch.randn(50, 3) * 4 + 1
    nn.init.ones_(dice.alpha)
    torch.testing.assert_close(dice(s), s)  # alpha 1: the identity
    nn.init.constant_(dice.alpha, 0.3)
    p = torch.sigmoid((s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-8).sqrt())
    torch.testing.assert_close(dice(s), p * s + (1 - p) * 0.3 * s)
    constant = torch.full((4, 3), 2.0)
    torch.testing.assert_close(dice(constant), (constant + 0.3 * constant) / 2)  # no variance: p is one half
    dice.eval()
    assert dice(s[:1]).shape == (1, 3)
    torch.testing.assert_close(dice(s)[:1], dice(s[:1]))  # running statistics, not the batch's


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_few_rows_uses_the_running_statistics(rows):
    norm = BatchNorm(2)
    norm(torch.randn(100, 2) * 3)
    kept = norm.running_mean.clone()
    x = torch.randn(rows, 2)
    found = norm(x)
    torch.testing.assert_close(found, norm.eval()(x))
    assert torch.equal(norm.running_mean, kept)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="unknown activation 'gelu'"):
        Head(3, act="gelu")
    with pytest.raises(UserError, match="hidden layer"):
        ActivationUnit(3, ())
    with pytest.raises(UserError, match="dropout"):
        Head(3, dropout=1.0)
    with pytest.raises(UserError, match="Dice of 3 columns got 4"):
        Dice(3)(torch.randn(5, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_dice_in_one_pass_is_dice_written_out(training: bool, rows: int):
    """Values, gradients and running statistics against float64, which goes the plain way."""
    torch.manual_seed(0)
    s = torch.randn(rows, 5) * 3 + 1
    plain, quick = Dice(5).double().train(training), Dice(5).train(training)
    for dice in (plain, quick):
        nn.init.constant_(dice.alpha, 0.3)
        nn.init.constant_(dice.norm.running_mean, 0.7)
    gradient = torch.randn(rows, 5)
    found = []
    for dice, dtype in ((plain, torch.float64), (quick, torch.float32)):
        given = s.to(dtype, copy=True).requires_grad_()
        out = dice(given)
        grads = torch.autograd.grad(out, [given, dice.alpha], gradient.to(dtype), retain_graph=True)
        found.append([out, *grads, dice.norm.running_mean, dice.norm.running_var])
    for wanted, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("without", ["three threads", "a compiler"])
def test_dice_is_the_same(monkeypatch: pytest.MonkeyPatch, without: str):
    torch.manual_seed(0)
    s, gradient, found = torch.randn(70_000, 5), torch.randn(70_000, 5), []
    for last in (False, True):
        if last and without == "a compiler":
            monkeypatch.setattr("embtab.models.dice.compiled_loop", lambda: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda last=last: 1 if last else 3)
        dice, given = Dice(5), s.clone().requires_grad_()
        out = dice(given)
        found.append([out, *torch.autograd.grad(out, [given, dice.alpha], gradient)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_long_histories_of_any_length_score_as_short_ones(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    unit, lengths = ActivationUnit(6, (8,), "sigmoid"), torch.tensor([40, 0, 3, 70])
    target, history = torch.randn(4, 6), torch.randn(113, 6)
    found = []
    for long in (1, 10**6):
        monkeypatch.setattr("embtab.models.din.LONG", long)
        given = [each.clone().requires_grad_() for each in (target, history)]
        scores = unit(*given, lengths)
        found.append([scores, *torch.autograd.grad(scores.sin().sum(), [*given, *unit.parameters()])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
