"""What each method does between lookup and pooling, by worked values; and the supernet that all of them share."""

import numpy as np
import pytest
import torch
from laws import single_ids
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.learned.dnis import DNIS, SoftSelection, frequency_blocks, moved
from embtab.learned.magnitude import Magnitude, Pruning
from embtab.learned.method import scores_of
from embtab.learned.optembed import Step, Thresholds
from embtab.learned.pep import PEP, SoftThreshold
from embtab.learned.supernet import Gate, Masked, Supernet

FEATURES = [
    et.Feature("a", 5),
    et.Feature("item", 9, id_space="items"),
    et.Feature("seen", 9, pooling="mean", id_space="items"),
]
DIM, ROWS = 4, 14


def supernet(gate: Gate, **options: object) -> Supernet:
    torch.manual_seed(0)
    return Supernet(FEATURES, DIM, gate, init_std=1.0, **options)  # type: ignore[arg-type]


def bags() -> KeyedJaggedTensor:
    values, lengths = torch.tensor([0, 4, 3, 8, 8, 1, 2, 7]), torch.tensor([1, 1, 1, 1, 0, 4])
    return KeyedJaggedTensor([f.name for f in FEATURES], values, lengths=lengths)


def test_an_open_gate_is_the_dense_collection() -> None:
    net = supernet(Gate())
    torch.manual_seed(0)
    dense = et.EmbeddingBagCollection(et.plan(FEATURES, dim=DIM), init_std=1.0)
    torch.testing.assert_close(net(bags()).values(), dense(bags()).values())
    ids = single_ids({"a": np.arange(5), "item": np.arange(5), "seen": np.arange(5)})
    for _ in range(3):  # one-id bags: bit for bit, in training too
        for tables in (net, dense):
            (tables(ids).values() ** 2).sum().backward()
    assert torch.equal(net(ids).values(), dense(ids).values())


def test_a_mask_is_applied_per_id_before_pooling_and_stops_the_gradient() -> None:
    mask = torch.rand(ROWS, DIM, generator=torch.Generator().manual_seed(1)) < 0.5
    net = supernet(Masked(mask))
    rows = {name: each.clone() for name, each in net.rows().items()}
    items = rows["items"] * mask[5:]
    out = net(bags()).to_dict()
    torch.testing.assert_close(out["seen"], torch.stack([torch.zeros(DIM), items[[8, 1, 2, 7]].mean(0)]))
    assert torch.equal(out["item"], items[[3, 8]])
    sum(vectors.sum() for vectors in out.values()).backward()
    for name, kept in {"a": mask[:5], "items": mask[5:]}.items():
        assert torch.equal(net.rows()[name][~kept], rows[name][~kept])
    assert not torch.equal(net.rows()["items"], rows["items"])
    assert net.seen()["a"].tolist() == [bool(mask[0].any()), False, False, False, bool(mask[4].any())]


def test_frozen_tables_take_no_step_but_their_gate_gets_its_gradient() -> None:
    gate = SoftSelection(torch.zeros(ROWS, dtype=torch.int64), 1, DIM)
    gate.alpha.requires_grad_()
    net = supernet(gate)
    before = {name: each.clone() for name, each in net.rows().items()}
    with net.frozen():
        net(bags()).values().sum().backward()
    assert gate.alpha.grad is not None
    assert gate.alpha.grad.abs().min() > 0
    assert all(torch.equal(before[name], each) for name, each in net.rows().items())
    net(bags()).values().sum().backward()
    assert not all(torch.equal(before[name], each) for name, each in net.rows().items())


def test_ids_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="feature 'a'"):
        supernet(Gate())(single_ids({"a": np.array([5]), "item": np.array([0]), "seen": np.array([0])}))


# OptEmbed


@pytest.mark.parametrize(
    ("x", "slope"), [(0, 2), (0.1, 1.6), (0.25, 1), (0.4, 0.4), (0.41, 0.4), (1.0, 0.4), (1.01, 0)]
)
def test_the_steps_estimator_by_hand(x: float, slope: float) -> None:
    for sign in (1, -1):
        at = torch.tensor([float(sign * x)], requires_grad=True)
        Step.apply(at).sum().backward()
        assert at.grad is not None
        assert at.grad.item() == pytest.approx(slope)


def test_thresholds_keep_rows_strictly_above() -> None:
    gate = Thresholds(2, DIM, alpha=0.1, lr=0.5).eval()
    rows = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [3, 0, 0, 0]], requires_grad=True)
    spaces = torch.tensor([0, 0, 1, 1])
    assert gate(rows, spaces, spaces).any(1).tolist() == [True, False, True, True]  # at t = 0 a zero row goes
    gate.thresholds.data[1] = 2.0
    out = gate(rows, spaces, spaces)
    assert out.any(1).tolist() == [True, False, False, True]  # the norm must exceed the threshold
    out.sum().backward()
    # A masked row learns through the estimator alone: slope times <gradient, row>, times the sign of its entries.
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad[2], torch.full((DIM,), 2.0 * 2))
    assert gate.thresholds.grad is not None
    assert gate.thresholds.grad[1].item() == pytest.approx(-(2.0 * 2 + 0.4 * 3))  # distances 0 and 1


def test_the_penalty_pushes_thresholds_up() -> None:
    gate = Thresholds(3, DIM, alpha=0.1, lr=0.5)
    (optimizer,) = gate.optimizers()
    gate.penalty().backward()
    assert torch.allclose(gate.thresholds.grad, torch.full((3,), -0.1))
    optimizer.step()
    assert torch.allclose(gate.thresholds, torch.full((3,), 0.05))


def test_training_sees_every_prefix_about_equally_often() -> None:
    gate = Thresholds(1, DIM, 0.0, 0.0).train()
    torch.manual_seed(0)
    seen = gate.pooled(torch.ones(4000, 2, DIM))
    widths = seen.sum(-1)
    assert torch.equal(seen, (torch.arange(DIM) < widths.unsqueeze(-1)).float())  # prefixes, and at least one column
    assert torch.bincount(widths.long().flatten(), minlength=DIM + 1)[1:].float().div(8000).sub(0.25).abs().max() < 0.02
    assert (widths[:, 0] != widths[:, 1]).any()  # each feature its own
    assert torch.equal(gate.eval().pooled(torch.ones(3, 2, DIM)), torch.ones(3, 2, DIM))


# PEP


@pytest.mark.parametrize(("kind", "shape"), [("global", (1, 1)), ("space", (3, 1)), ("column", (1, 4))])
def test_thresholds_may_be_coarse(kind: str, shape: tuple[int, int]) -> None:
    gate = SoftThreshold(3, DIM, PEP(thresholds=kind))
    assert tuple(gate.s.shape) == shape
    assert tuple(gate.values().shape) == (3, 4)


def test_soft_thresholds_by_hand() -> None:
    rows, spaces = torch.randn(50, DIM), torch.zeros(50, dtype=torch.int64)
    gate = SoftThreshold(1, DIM, PEP(initial=-150.0))
    assert torch.equal(gate(rows, spaces, spaces), rows)  # sigmoid(-150) is nothing
    kept = []
    for s in (-4.0, -1.0, 0.0, 1.0, 40.0):
        gate.s.data.fill_(s)
        out = gate(rows, spaces, spaces)
        expected = np.sign(rows) * np.maximum(np.abs(rows) - 1 / (1 + np.exp(-s)), 0)
        np.testing.assert_allclose(out.detach(), expected, atol=1e-6)
        assert bool(((out == 0) | (out.sign() == rows.sign())).all())
        kept.append(int((out != 0).sum()))
    assert kept == sorted(kept, reverse=True)


def test_weight_decay_alone_raises_thresholds_at_first() -> None:
    """In float32 the data has no say where sigmoid and its derivative are zero."""
    moved_by = {}
    for decay in (0.0, 1e-5):
        gate = SoftThreshold(1, DIM, PEP(initial=-150.0, threshold_lr=0.1, weight_decay=decay or 1.0))
        (optimizer,) = gate.optimizers()
        optimizer.param_groups[0]["weight_decay"] = decay
        for _ in range(5):
            optimizer.zero_grad()
            gate(torch.randn(8, DIM), torch.zeros(8).long(), torch.zeros(8).long()).square().sum().backward()
            optimizer.step()
        moved_by[decay] = float((gate.s.detach() + 150).mean())
    assert moved_by[0.0] == 0
    assert moved_by[1e-5] == pytest.approx(0.5, rel=0.01)  # about threshold_lr a step, whatever the decay


# DNIS


def test_blocks_partition_the_ids_by_frequency() -> None:
    counts = [np.array([5, 100, 1]), np.array([7, 50, 50, 2, 3, 0, 9])]
    blocks = frequency_blocks(counts, (0.2, 0.3, 0.5))
    assert blocks.tolist() == [2, 0, 2, 1, 0, 1, 2, 2, 2, 1]
    assert np.bincount(frequency_blocks([np.arange(1000)], DNIS().blocks)).tolist() == [100, 200, 200, 200, 300]


def test_alpha_one_is_the_identity_and_alpha_zero_a_block_of_zeros() -> None:
    gate = SoftSelection(torch.tensor([0] * 5 + [1] * 9), 2, DIM)
    net = supernet(gate)
    rows = {name: each.clone() for name, each in net.rows().items()}
    assert all(torch.equal(each, rows[name]) for name, each in net.gated().items())
    gate.alpha[1] = 0
    assert torch.equal(net.gated()["a"], rows["a"])
    assert not net.gated()["items"].any()
    gate.alpha.uniform_(0, 1)
    before, folded = net(bags()).values(), net.gated()
    gate.alpha.fill_(1)
    for name, each in net.rows().items():
        each.copy_(folded[name])
    assert torch.equal(net(bags()).values(), before)  # folding alpha into the rows changes nothing


def test_a_step_of_alpha_by_hand() -> None:
    alpha = torch.tensor([[0.5, 0.5], [1.0, 0.001]])
    moved(alpha, torch.tensor([[3.0, -1.0], [0.0, 0.0]]), lr=0.1, l1=0.01)
    torch.testing.assert_close(alpha, torch.tensor([[0.5 - 0.15 - 0.001, 0.5 + 0.05 - 0.001], [0.999, 0.0]]))


# Magnitude


def test_the_schedule_ends_in_the_budget() -> None:
    pruning = Pruning.__new__(Pruning)
    pruning.method, pruning.full = Magnitude(epochs=10, start=0.2, end=0.8), 1000
    pruning.lab = type("Lab", (), {"budget": 100})()  # type: ignore[assignment]
    pruning.data = type("Data", (), {"steps_per_epoch": 10})()  # type: ignore[assignment]
    allowed = [pruning.allowed(step) for step in range(0, 101, 10)]
    assert allowed[:3] == [1000] * 3
    assert allowed[8:] == [100] * 3
    assert allowed[5] == 100 + int(900 * 0.5**3)
    assert allowed == sorted(allowed, reverse=True)


def test_impact_weighs_magnitudes_by_the_gradients_a_row_has_seen() -> None:
    net = supernet(Gate())
    rows = net.rows()["a"]
    for id_, times in {1: 1, 2: 4}.items():
        for _ in range(times):
            batch = single_ids({"a": np.array([id_]), "item": np.array([0]), "seen": np.array([0])})
            net(batch)["a"].sum().backward()
    training = type("T", (), {"tables": net})()
    plain, impact = scores_of(training)["a"], scores_of(training, by="impact")["a"]
    assert np.isneginf(plain[[0, 3, 4]]).all()  # never trained
    np.testing.assert_allclose(plain[[1, 2]], np.abs(rows[[1, 2]].numpy()))
    np.testing.assert_allclose(impact[[1, 2]], plain[[1, 2]] * np.array([[1.0], [2.0]]), rtol=1e-6)
