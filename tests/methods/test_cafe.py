"""The hot table: continuous promotions, exact counts and bytes, and an advantage when what is hot changes."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import EXTREMES, single_ids, tables_of
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.methods.cafe import CAFE
from embtab.reader import decoders
from embtab.reader import read as reader

N = 5000


def plan(n: int = N, budget: object = "0.1x", dim: int = 8, **options: object) -> et.Plan:
    return et.plan([et.Feature("f", n)], "cafe", budget, dim, **{"every": 10, **options})


def collection(planned: et.Plan, backend: str = "torch", **options: object) -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return et.EmbeddingBagCollection(planned, backend=backend, init_std=1.0, **options)


def encoding(tables: et.EmbeddingBagCollection) -> CAFE:
    found = tables.plan.encoding("f")
    assert isinstance(found, CAFE)
    return found


def vectors(tables: et.EmbeddingBagCollection, ids: np.ndarray) -> np.ndarray:
    """Without counting them."""
    found = tables.eval()(single_ids({"f": ids})).values().detach().numpy()
    tables.train()
    return found


def see(tables: et.EmbeddingBagCollection, ids: np.ndarray) -> None:
    with torch.no_grad():
        tables(single_ids({"f": ids}))


def rows(tables: et.EmbeddingBagCollection, ids: np.ndarray) -> np.ndarray:
    cafe = encoding(tables)
    c = {name: np.array(value) for name, value in cafe.constants().items()}
    return cafe.rows(ids[:, None], c | {"slots": tables_of(tables)["f.slots"]})[:, 0]


def hot(tables: et.EmbeddingBagCollection) -> set[int]:
    """The ids that own a row."""
    slots, cafe = tables_of(tables)["f.slots"], encoding(tables)
    home = decoders.hash_rows(slots, cafe.seeds[0], cafe.num_buckets)
    return set(slots[home == np.arange(len(slots)) // 4].tolist())


def frequent(random: np.random.Generator, ids: np.ndarray, each: int = 20, tail: int = 2000) -> np.ndarray:
    """Some ids `each` times among rare ones."""
    return random.permutation(np.concatenate([np.repeat(ids, each), random.integers(0, N, tail)]))


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
def test_no_vector_jumps_when_an_id_is_promoted(backend: str) -> None:
    tables, everything = collection(plan(), backend), np.arange(N)
    heavy, later = np.arange(0, 40) * 7, np.arange(1, 41) * 7 + 3
    random = np.random.default_rng(0)
    see(tables, frequent(random, heavy))
    before = vectors(tables, everything)
    assert tables.adapt(step=10) == ["f"]
    np.testing.assert_array_equal(vectors(tables, everything), before)
    first = hot(tables)
    assert set(heavy.tolist()) <= first
    assert len(first) <= 4 * encoding(tables).num_buckets

    tables.lookup.table("f").add_(torch.randn(tables.lookup.table("f").shape))  # as training would
    for step in (20, 30, 40):
        see(tables, frequent(random, later))
        before, held = vectors(tables, everything), hot(tables)
        tables.adapt(step)
        after, demoted = vectors(tables, everything), np.array(sorted(held - hot(tables)), dtype=np.int64)
        stayed = np.setdiff1d(everything, demoted)
        np.testing.assert_array_equal(after[stayed], before[stayed])
        shared = 4 * encoding(tables).num_buckets
        shared_rows = shared + decoders.hash_rows(demoted, encoding(tables).seeds[1], encoding(tables).num_rows)
        np.testing.assert_array_equal(after[demoted], tables_of(tables)["f"][shared_rows])
        assert len(demoted)
    assert set(later.tolist()) <= hot(tables)
    np.testing.assert_array_equal(vectors(tables, everything), reader.vectors(*described(tables), everything))


def described(tables: et.EmbeddingBagCollection) -> tuple:
    return tables.plan.to_dict(), tables_of(tables), "f"


def test_a_hot_id_owns_its_row() -> None:
    tables = collection(plan())
    see(tables, frequent(np.random.default_rng(1), np.arange(30)))
    tables.adapt(step=10)
    read = rows(tables, np.arange(N))
    exclusive = read < 4 * encoding(tables).num_buckets
    assert len(set(read[exclusive].tolist())) == exclusive.sum() == len(hot(tables))
    assert set(np.flatnonzero(exclusive).tolist()) == hot(tables)
    assert 4 * encoding(tables).num_buckets <= read[~exclusive].min()
    assert read.max() < tables.plan.tables["f"].num_rows


def test_empty_slots_match_no_id() -> None:
    """Also not the ids that empty slots hold."""
    tables = collection(plan())
    assert hot(tables) == set()
    held = np.unique(tables_of(tables)["f.slots"])
    assert rows(tables, held).min() >= 4 * encoding(tables).num_buckets
    tables.adapt(step=10)  # without having seen anything
    assert hot(tables) == set()


def test_the_sketch_counts_every_id_and_forgets_by_half() -> None:
    tables, random = collection(plan()), np.random.default_rng(2)
    cafe, seen = encoding(tables), random.zipf(1.3, 3000) % N
    for batch in np.array_split(seen, 5):
        see(tables, batch)
    exact = Counter(seen.tolist())
    ids = torch.tensor(list(exact))
    counted = cafe._counts(ids, tables.arrays.of("f"))
    true = torch.tensor([exact[i] for i in ids.tolist()])
    assert bool((counted >= true).all())
    assert float((counted == true).float().mean()) > 0.9
    tables.adapt(step=10)
    assert torch.equal(cafe._counts(ids, tables.arrays.of("f")), counted // 2)
    sketch = tables.state_dict()["arrays.f.sketch.training"].clone()
    vectors(tables, np.arange(100))  # evaluation is not counted
    assert torch.equal(tables.state_dict()["arrays.f.sketch.training"], sketch)


def test_equals_do_not_change_places() -> None:
    """A newcomer must beat a hot id by half."""
    tables, random = collection(plan(budget=2000)), np.random.default_rng(3)
    ids = np.arange(60)
    see(tables, random.permutation(np.repeat(ids, 10)))
    tables.adapt(step=10)
    held = hot(tables)
    assert len(held) > 25
    others = np.setdiff1d(ids, sorted(held))
    see(tables, np.concatenate([np.repeat(ids, 10), np.repeat(others, 5)]))  # 20 against 15
    tables.adapt(step=20)
    assert hot(tables) >= held
    see(tables, np.repeat(others, 20))
    tables.adapt(step=30)
    assert len(held & hot(tables)) < len(held)


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
def test_every_int64_may_be_hot_in_bags_of_any_size(backend: str) -> None:
    tables = collection(plan(), backend)
    bags = [[*EXTREMES, EXTREMES[1]], [], [5, 5, 2**63 - 1], list(range(50))]
    flat = torch.tensor([i for bag in bags for i in bag])
    batch = KeyedJaggedTensor(["f"], flat.repeat(3), lengths=torch.tensor([len(bag) for bag in bags] * 3))
    before = tables(batch).values().detach()
    tables.adapt(step=10)
    assert set(EXTREMES) | {5} <= hot(tables)
    torch.testing.assert_close(tables(batch).values().detach(), before, rtol=0, atol=0)
    tables.lookup.table("f").normal_()
    offsets = np.cumsum([0, *map(len, bags)])
    expected = reader.lookup(*described(tables), flat.numpy(), offsets)
    np.testing.assert_allclose(tables(batch).values().detach()[:4], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_the_optimizer_remembers_nothing_of_a_promoted_row(optimizer: str) -> None:
    tables = collection(plan(), "fbgemm", optimizer=et.Optimizer(optimizer))
    tables(single_ids({"f": np.arange(200)})).values().square().sum().backward()
    moments = {name: state.clone() for name, state in tables.lookup.optimizer_state().items()}
    tables.lookup.optimizer_state().get("f", torch.zeros(1))[:100] = 3.0  # of the ids that had these rows before
    tables.adapt(step=10)
    taken = np.unique(rows(tables, np.array(sorted(hot(tables)))))
    assert len(taken) > 100
    for name, state in tables.lookup.optimizer_state().items():
        assert not state[taken].any()
        shared = 4 * encoding(tables).num_buckets
        assert torch.equal(state[shared:], moments[name][shared:])


def test_bytes_are_rows_and_slots_and_the_sketch_is_reported_beside_them() -> None:
    planned = plan(budget=20_000)
    cafe = planned.encoding("f")
    assert isinstance(cafe, CAFE)
    slots = 4 * cafe.num_buckets
    assert slots == 4 * (14_000 // (4 * (32 + 8)))
    assert planned.bytes_by_part() == {"f": (slots + cafe.num_rows) * 32, "f.slots": slots * 8}
    assert 20_000 - 32 < planned.nbytes <= 20_000
    assert planned.training_nbytes == slots * 8 + 2 * 8 * slots * 4
    assert "training also keeps counters of 25.1 kB" in planned.describe()
    assert et.plan([et.Feature("f", N)], "hash", 20_000, 8).training_nbytes == 0


@pytest.mark.parametrize("dim", [4, 16])
def test_the_smallest_form_is_two_buckets_and_a_row(dim: int) -> None:
    smallest = 8 * (dim * 4 + 8) + dim * 4
    with pytest.raises(et.InfeasibleBudget, match="'cafe' cannot fit") as caught:
        plan(budget=smallest - 1, dim=dim)
    assert caught.value.min_bytes == smallest
    assert plan(budget=smallest, dim=dim).nbytes == smallest
    assert plan(n=10, budget=10 * dim * 4, dim=dim).encoding("f").method == "dense"


@pytest.mark.parametrize("hot_share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("budget", [400, 1000, 30_000])
def test_any_share_of_hot_rows_keeps_the_budget(hot_share: float, budget: int) -> None:
    assert budget - 32 < plan(budget=budget, hot=hot_share).nbytes <= budget


@pytest.mark.parametrize(
    ("options", "message"), [({"hot": 0.0}, "hot is a share"), ({"hot": 1.0}, "hot is a"), ({"every": 0}, "every must")]
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**options)


def test_counters_are_saved_but_may_be_absent() -> None:
    tables = collection(plan(), "fbgemm")
    see(tables, np.arange(500))
    tables.adapt(step=10)
    see(tables, np.arange(300))
    state, other = tables.state_dict(), collection(plan())
    assert [name for name in state if name.endswith(".training")] == [
        "arrays.f.candidates.training",
        "arrays.f.sketch.training",
    ]
    other.load_state_dict(state)
    assert all(
        torch.equal(value, other.state_dict()[name])
        for name, value in state.items()
        if not name.endswith((".optimizer", "_extra_state"))
    )
    served = {name: value for name, value in state.items() if not name.endswith(".training")}
    fresh = collection(plan())
    fresh.load_state_dict(served)
    np.testing.assert_array_equal(vectors(fresh, np.arange(N)), vectors(tables, np.arange(N)))
    with pytest.raises(RuntimeError, match=r"arrays\.f\.slots"):
        fresh.load_state_dict({name: value for name, value in served.items() if name != "arrays.f.slots"})


def losses_under_drift(method: str, seed: int) -> list[float]:
    """Mean log loss of the last steps before and after the popular ids change; each id has a click rate of its own."""
    random, steps = np.random.default_rng(seed), 250
    hidden = random.normal(0, 2, N).astype(np.float32)
    popularity = np.cumsum(1 / np.arange(1, N + 1) ** 1.1)
    torch.manual_seed(seed)
    planned = et.plan([et.Feature("f", N)], method, "0.05x", 8, seed)
    tables, head = et.EmbeddingBagCollection(planned), nn.Linear(8, 1)
    optimizer, losses = torch.optim.Adam(head.parameters(), 0.01), []
    for step in range(2 * steps):
        if step % steps == 0:
            order = random.permutation(N)
        ids = order[np.searchsorted(popularity, random.random(256) * popularity[-1])]
        label = torch.from_numpy(random.random(256) < 1 / (1 + np.exp(-hidden[ids]))).float()
        tables.adapt(step)
        loss = F.binary_cross_entropy_with_logits(head(tables(single_ids({"f": ids})).values())[:, 0], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [float(np.mean(losses[end - 100 : end])) for end in (steps, 2 * steps)]


def test_beats_hashing_at_equal_bytes_before_and_after_drift() -> None:
    for seed in range(2):
        ours, hashed = losses_under_drift("cafe", seed), losses_under_drift("hash", seed)
        assert ours[0] < hashed[0] - 0.005
        assert ours[1] < hashed[1] - 0.005
