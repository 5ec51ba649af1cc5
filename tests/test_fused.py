"""Fused tables are used as any module's parameters are, and their optimizer as any torch optimizer is."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from laws import CASES, FEATURES, Bags, Case
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError

FUSED = ["fbgemm", "native"]
every_fused = pytest.mark.parametrize("backend", FUSED)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAMES = ("user.id", "training", "forward", "plain")  # names with dots, and those of a module's attributes


def batch(seed: int = 0, weighted: bool = False) -> KeyedJaggedTensor:
    random = np.random.default_rng(seed)
    content = {f.name: [[(int(i), 1.5) for i in random.integers(0, f.num_ids, n)] for n in (2, 0, 3)] for f in FEATURES}
    return Bags(content).kjt(weighted)


def collection(case: Case, backend: str, optimizer: et.Optimizer | None = None) -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return et.EmbeddingBagCollection(case.plan(), backend=backend, optimizer=optimizer, init_std=1.0)


def step(tables: et.EmbeddingBagCollection, seed: int = 0) -> None:
    tables(batch(seed)).values().square().sum().backward()


def rows(tables: et.EmbeddingBagCollection) -> dict[str, Tensor]:
    return {name: tables.lookup.table(name).clone() for name in tables.plan.tables}


def moved(tables: et.EmbeddingBagCollection, before: dict[str, Tensor]) -> set[str]:
    return {name for name, was in before.items() if not torch.equal(was, tables.lookup.table(name))}


def named(backend: str, **options: float) -> et.EmbeddingBagCollection:
    """One id space a name, of widths that kernels pad."""
    plan = et.plan([et.Feature(name, 20) for name in NAMES], dim=6)
    return et.EmbeddingBagCollection(plan, backend, et.Optimizer(**options) if options else None, init_std=1.0)


def ids(seed: int = 0) -> KeyedJaggedTensor:
    values = torch.randint(0, 20, (8 * len(NAMES),), generator=torch.Generator().manual_seed(seed))
    return KeyedJaggedTensor(list(NAMES), values, lengths=torch.full((4 * len(NAMES),), 2))


@pytest.mark.parametrize("backend", ["torch", *FUSED])
@every_case
def test_parameters_have_the_names_and_values_of_the_state_dict(case: Case, backend: str) -> None:
    tables = collection(case, backend)
    step(tables)
    state = tables.state_dict()
    for name, parameter in tables.named_parameters():
        assert torch.equal(parameter.detach(), state[name]), name
    assert {f"lookup.{name}" for name in tables.plan.tables} <= dict(tables.named_parameters()).keys()


@every_fused
@every_case
def test_frozen_tables_stay_and_weights_still_get_their_gradient(case: Case, backend: str) -> None:
    tables = collection(case, backend)
    before = rows(tables)
    free, frozen = batch(weighted=True), batch(weighted=True)
    free.weights().requires_grad_()
    frozen.weights().requires_grad_()
    tables.requires_grad_(False)
    tables(frozen).values().square().sum().backward()
    assert moved(tables, before) == set()
    tables.requires_grad_(True)
    tables(free).values().square().sum().backward()
    assert moved(tables, before) or not before
    torch.testing.assert_close(frozen.weights().grad, free.weights().grad, rtol=1e-4, atol=1e-4)


@every_fused
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_one_table_of_several_can_be_frozen(backend: str, name: str) -> None:
    tables = named(backend, name=name, lr=0.1, weight_decay=0.1)
    before, moments = rows(tables), copy.deepcopy(tables.lookup.optimizer_state())
    for table in ("user.id", "forward"):
        tables.lookup.listed[table].requires_grad_(False)
    for seed in range(3):
        tables(ids(seed)).values().square().sum().backward()
    assert moved(tables, before) == {"training", "plain"}
    for table in ("user.id", "forward"):
        assert name == "sgd" or torch.equal(tables.lookup.optimizer_state()[table], moments[table])


@every_fused
@every_case
def test_backward_in_evaluation_trains_nothing(case: Case, backend: str) -> None:
    tables = collection(case, backend).eval()
    before = rows(tables)
    vectors = tables(batch()).values()
    assert vectors.requires_grad
    vectors.square().sum().backward()
    assert moved(tables, before) == set()


@pytest.mark.parametrize("backend", ["torch", *FUSED])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
def test_averages_of_tables_are_those_of_their_values(backend: str, average) -> None:
    tables = named(backend)
    averaged = AveragedModel(tables, multi_avg_fn=average)
    seen = []
    for seed in range(3):
        tables(ids(seed)).values().square().sum().backward()
        with torch.no_grad():
            for parameter in tables.parameters() if backend == "torch" else []:
                parameter.sub_(0.1 * parameter.grad)
        averaged.update_parameters(tables)
        seen.append(rows(tables))
    expected = {
        name: (sum(each[name] for each in seen) / 3 if average is None else seen[0][name] / 4 + seen[1][name] / 4
               + seen[2][name] / 2)
        for name in seen[0]
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(averaged.module.lookup.table(name), value)
        torch.testing.assert_close(averaged.module.state_dict()[f"lookup.{name}"], value)


@pytest.mark.parametrize("backend", ["torch", *FUSED])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_alone(backend: str, how: str) -> None:
    if (backend, how) == ("fbgemm", "pickle"):
        pytest.skip("fbgemm's kernels hold a closure, which no pickle takes")
    tables = named(backend)
    tables.lookup.listed["plain"].requires_grad_(False)
    copied = copy.deepcopy(tables) if how == "deepcopy" else pickle.loads(pickle.dumps(tables))
    before = rows(tables)
    copied(ids()).values().square().sum().backward()
    if backend == "torch":
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
    assert moved(tables, before) == set()
    assert moved(copied, before) == set(before) - {"plain"}
    for name, parameter in copied.named_parameters():
        assert torch.equal(parameter.detach(), copied.state_dict()[name])


@every_fused
def test_a_learning_rate_that_was_changed_is_saved_and_moves_along(backend: str) -> None:
    tables = named(backend, name="sgd", lr=0.1)
    tables.set_learning_rate(0.0)
    buffer = io.BytesIO()
    torch.save(tables.state_dict(), buffer)
    buffer.seek(0)
    again = named(backend, name="sgd", lr=0.1)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    other = named(backend, name="sgd", lr=0.2)
    other.load_state_dict(tables.state_dict())
    for each, rate in ((again, 0.0), (other, 0.2), (copy.deepcopy(tables), 0.0), (tables.to("cpu"), 0.0)):
        assert each.fused_optimizer.param_groups[0]["lr"] == rate
        before = rows(each)
        each(ids()).values().square().sum().backward()
        assert bool(moved(each, before)) == bool(rate)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused(lr: float) -> None:
    tables = named("native")
    with pytest.raises(UserError, match="lr must be zero or more and finite"):
        tables.set_learning_rate(lr)
    tables.fused_optimizer.param_groups[0]["lr"] = lr  # as a schedule might
    with pytest.raises(UserError, match="lr must be zero or more and finite"):
        tables(ids()).values().sum().backward()


@pytest.mark.parametrize(
    "other",
    [
        et.plan([et.Feature("a", 90), et.Feature("b", 90)], "hash", "0.5x", 8, seed=1),
        et.plan([et.Feature("a", 90), et.Feature("b", 80)], "hash", "0.5x", 8),
    ],
)
def test_a_state_under_another_plan_is_refused(other: et.Plan) -> None:
    plan = et.plan([et.Feature("a", 90), et.Feature("b", 90)], "hash", "0.5x", 8)
    state = et.EmbeddingBagCollection(plan).state_dict()
    with pytest.raises(UserError, match="the saved tables belong to another plan"):
        et.EmbeddingBagCollection(other).load_state_dict(state)
    precise = et.plan([et.Feature("a", 90), et.Feature("b", 90)], "dense", None, 8)
    served = et.plan([et.Feature("a", 90), et.Feature("b", 90)], "dense", None, 8, precision="int8")
    et.EmbeddingBagCollection(served).load_state_dict(et.EmbeddingBagCollection(precise).state_dict())


def test_features_that_swap_names_are_another_plan() -> None:
    """Tables shared by all features have the same shape whatever the features are called."""
    one, two = ([et.Feature(name, 500) for name in names] for names in (("C1", "C2"), ("c1", "c2")))
    state = et.EmbeddingBagCollection(et.plan(one, "unified", "0.3x")).state_dict()
    with pytest.raises(UserError, match="another plan"):
        et.EmbeddingBagCollection(et.plan(two, "unified", "0.3x")).load_state_dict(state)


@every_fused
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("width", range(1, 10))
def test_decay_and_clamp_are_those_of_the_definition(backend: str, name: str, width: int) -> None:
    """Against NumPy, at every width: fbgemm pads rows to multiples of four."""
    lr, decay, most = 0.1, 0.3, 0.5
    plan = et.plan([et.Feature("a", 7)], dim=width)
    tables = et.EmbeddingBagCollection(plan, backend, et.Optimizer(name, lr, 1e-8, decay, most), init_std=1.0)
    table = tables.lookup.table("a").numpy().copy().astype(np.float64)
    moment = np.zeros_like(table)
    for seed in range(3):
        random = np.random.default_rng(seed)
        chosen = random.integers(0, 7, 6)
        above = random.standard_normal((3, width)).astype(np.float32)
        given = KeyedJaggedTensor(["a"], torch.from_numpy(chosen), lengths=torch.tensor([3, 2, 1]))
        tables(given).values().backward(torch.from_numpy(above))
        gradient = np.zeros_like(table)
        np.add.at(gradient, chosen, above.clip(-most, most)[[0, 0, 0, 1, 1, 2]])
        touched = np.unique(chosen)
        gradient[touched] += decay * table[touched]
        if name == "sgd":
            table -= lr * gradient
            continue
        squares = gradient**2
        moment += squares if name == "adagrad" else squares.mean(1, keepdims=True)
        table -= lr * gradient / (np.sqrt(moment) + 1e-8)
    np.testing.assert_allclose(tables.lookup.table("a").numpy(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", range(1, 10))
@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad"])
def test_training_goes_on_alike_in_another_backend(name: str, width: int) -> None:
    """What the optimizer remembers means the same everywhere."""
    plan = et.plan([et.Feature(each, 20) for each in NAMES], dim=width)
    made = [et.EmbeddingBagCollection(plan, each, et.Optimizer(name, 0.1), init_std=1.0) for each in FUSED * 2]
    first, second, third, fourth = made
    second.load_state_dict(first.state_dict())
    first(ids(1)).values().square().sum().backward()
    second(ids(1)).values().square().sum().backward()
    third.load_state_dict(second.state_dict())  # native's state in fbgemm, and the other way round
    fourth.load_state_dict(first.state_dict())
    for each in made:
        each(ids(2)).values().square().sum().backward()
    for each in made[1:]:
        for table in NAMES:
            torch.testing.assert_close(each.lookup.table(table), first.lookup.table(table), rtol=1e-4, atol=1e-5)


@every_fused
@pytest.mark.parametrize("make", [
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.3, 0.2], total_steps=8, cycle_momentum=False),
], ids=["step", "cosine", "one cycle"])  # fmt: skip
def test_one_schedule_drives_ranker_and_tables(backend: str, make) -> None:
    """As the torch backend with torch's SGD does, the ranker's group and the tables'."""
    results = []
    for each in (backend, "torch"):
        tables, head = named(each, name="sgd", lr=0.2) if each != "torch" else named(each), torch.nn.Linear(24, 1)
        tables.init(0.1, seed=0)
        torch.nn.init.constant_(head.weight, 0.1)
        torch.nn.init.zeros_(head.bias)
        if each == "torch":
            groups = [{"params": list(head.parameters()), "lr": 0.3}, {"params": list(tables.parameters()), "lr": 0.2}]
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups)
        else:
            optimizer = et.with_tables(torch.optim.SGD(head.parameters(), lr=0.3), tables)
        schedule = make(optimizer)
        rates = []
        for seed in range(6):
            optimizer.zero_grad()
            head(tables(ids(seed)).values()).square().mean().backward()
            optimizer.step()
            schedule.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
        results.append((rates, rows(tables), head.weight.detach()))
    (rates, tables_, weight), (expected_rates, expected, expected_weight) = results
    np.testing.assert_allclose(rates, expected_rates)
    torch.testing.assert_close(weight, expected_weight)
    for name, value in expected.items():
        torch.testing.assert_close(tables_[name], value)


def test_optimizers_go_on_from_what_they_saved_and_refuse_that_of_others() -> None:
    head, tables = torch.nn.Linear(2, 1), named("native", lr=0.1)
    optimizer = et.with_tables(torch.optim.Adam(head.parameters(), lr=0.01), tables)
    tables.set_learning_rate(0.05)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = named("native", lr=0.1)
    et.with_tables(torch.optim.Adam(head.parameters(), lr=0.01), fresh).load_state_dict(state)
    assert fresh.fused_optimizer.settings.lr == 0.05
    changed = named("native", lr=0.2)  # configured anew
    again = et.with_tables(torch.optim.Adam(head.parameters(), lr=0.02), changed)
    again.load_state_dict(state)
    assert [group["lr"] for group in again.param_groups] == [0.02, 0.2]
    with pytest.raises(UserError, match="trained by 'rowwise_adagrad' and these are by 'sgd'"):
        et.with_tables(torch.optim.Adam(head.parameters()), named("native", name="sgd")).load_state_dict(state)
    with pytest.raises(UserError, match="another optimizer, backend"):
        et.with_tables(torch.optim.Adam(head.parameters()), head).load_state_dict(state)
    with pytest.raises(UserError, match="does not fit the ranker's parameters"):
        et.with_tables(torch.optim.Adam([head.weight]), named("native")).load_state_dict(state)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
@every_case
def test_decay_and_clamp_are_the_same_in_every_backend(case: Case, name: str) -> None:
    """Products too, whose parts each have a gradient of their own."""
    optimizer = et.Optimizer(name, 0.01, weight_decay=0.1, max_gradient=0.5)
    one, two = (collection(case, backend, optimizer) for backend in FUSED)
    two.load_state_dict(one.state_dict())
    for seed in range(2):
        for tables in (one, two):
            tables(batch(seed, weighted=True)).values().square().sum().backward()
    for table in one.plan.tables:
        torch.testing.assert_close(two.lookup.table(table), one.lookup.table(table), rtol=1e-4, atol=1e-4)
