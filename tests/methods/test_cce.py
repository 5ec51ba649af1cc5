"""Clustered compositional embeddings: what a clustering keeps, what it costs, and that it pays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import single_ids, tables_of

import embtab as et
from embtab.errors import UserError
from embtab.methods.cce import CCE
from embtab.methods.kmeans import group_means, kmeans, nearest
from embtab.reader import decoders

CRITEO_LARGE = [10131227, 2202608, 8351593, 5461306, 7046547, 286181, 142572]


def plan(n: int = 1000, budget: object = "0.4x", dim: int = 8, seed: int = 0, **options: object) -> et.Plan:
    return et.plan([et.Feature("f", n)], "cce", budget, dim, seed, **options)


def collection(planned: et.Plan, backend: str = "torch", **options: object) -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return et.EmbeddingBagCollection(planned, backend=backend, init_std=1.0, **options)


def vectors(tables: et.EmbeddingBagCollection) -> np.ndarray:
    ids = {"f": np.arange(tables.plan.features[0].num_ids)}
    return tables(single_ids(ids)).values().detach().numpy()


def encoding(planned: et.Plan) -> CCE:
    found = planned.encoding("f")
    assert isinstance(found, CCE)
    return found


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_are_the_pointers_then_the_hashes(kind: str) -> None:
    cce = encoding(plan(chunks=2))
    pointers = np.stack([np.arange(1000) % cce.centroids, np.arange(1000) * 7 % cce.centroids], 1).astype(np.uint8)
    seeds, ids = np.array([5, -(2**62)]), np.array([[3], [999], [3]])
    c = {name: np.array(value) for name, value in cce.constants().items()} | {"pointers": pointers, "seeds": seeds}
    if kind == "torch":
        rows = cce.rows(torch.from_numpy(ids), {name: torch.from_numpy(value) for name, value in c.items()})
        assert rows.dtype == torch.int64
    else:
        rows = cce.rows(ids, c)
    for row, id_ in zip(np.asarray(rows), [3, 999, 3], strict=True):
        hashed = [int(decoders.hash_rows(np.array([id_]), int(seed), cce.num_rows)[0]) for seed in seeds]
        pointed = [int(pointer) for pointer in pointers[id_]]
        expected = [pointed[0], cce.centroids + pointed[1], hashed[0], cce.num_rows + hashed[1]]
        assert row.tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
def test_few_distinct_sums_survive_a_clustering(backend: str) -> None:
    """No more distinct sums in a chunk than there are centroids: nothing is lost, and nothing is left over for T1."""
    planned = plan(n=500, chunks=4)
    tables = collection(planned, backend)
    tables.lookup.table("f@hashed").fill_(0.25)
    before = vectors(tables)
    assert 60 < len(np.unique(before[:, :2], axis=0)) <= encoding(planned).centroids
    assert tables.adapt(step=1, epoch=1) == ["f"]
    np.testing.assert_allclose(vectors(tables), before, atol=1e-5)
    assert tables.lookup.table("f@hashed").abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"chunks": 4}, {"chunks": 2, "centroids": 20}, {"centroids": 300, "chunks": 1}])
@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
def test_a_clustering_is_what_its_definition_says(backend: str, options: dict) -> None:
    """Every id at its nearest centroid; T1 the mean of what is left over, under one new hash for all ids."""
    planned = plan(n=800, budget="0.6x", **options)
    tables, cce = collection(planned, backend), encoding(planned)
    before = vectors(tables)
    old = tables_of(tables)["f.seeds"].copy()
    tables.adapt(step=1, epoch=1)
    state, width = tables_of(tables), 8 // cce.chunks
    pointers, seeds = state["f.pointers"], state["f.seeds"]
    assert not np.isin(seeds, old).any()
    assert 0 <= pointers.min() <= pointers.max() < cce.centroids
    for j in range(cce.chunks):
        sums = before[:, j * width : (j + 1) * width]
        t0 = state["f@pointed"].reshape(cce.chunks, cce.centroids, width)[j]
        t1 = state["f@hashed"].reshape(cce.chunks, cce.num_rows, width)[j]
        distances = ((sums[:, None] - t0[None]) ** 2).sum(2)
        own = distances[np.arange(800), pointers[:, j]]
        np.testing.assert_allclose(own, distances.min(1), atol=1e-4)
        assert own.mean() < sums.var(0).sum()
        hashed = decoders.hash_rows(np.arange(800), int(seeds[j]), cce.num_rows)
        for row in range(cce.num_rows):
            left_over = (sums - t0[pointers[:, j]])[hashed == row]
            expected = left_over.mean(0) if len(left_over) else np.zeros(width)
            np.testing.assert_allclose(t1[row], expected, atol=1e-4)
    error, spread = ((vectors(tables) - before) ** 2).mean(), before.var()
    assert error < 0.6 * spread


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_the_optimizer_remembers_the_mean_of_each_table(optimizer: str) -> None:
    tables = collection(plan(), "fbgemm", optimizer=et.Optimizer(optimizer))
    tables(single_ids({"f": np.arange(300)})).values().square().sum().backward()
    before = {name: moments.clone() for name, moments in tables.lookup.optimizer_state().items()}
    tables.adapt(step=1, epoch=1)
    after = tables.lookup.optimizer_state()
    assert before.keys() == after.keys()
    for name, moments in after.items():
        torch.testing.assert_close(moments, before[name].mean(0, keepdim=True).expand_as(moments))


def test_a_clustering_depends_on_seed_and_step_alone() -> None:
    def after(step: int, seed: int = 0) -> dict[str, np.ndarray]:
        tables = collection(plan(n=300, seed=seed))
        tables.adapt(step, epoch=1)
        return tables_of(tables)

    one, same = after(7), after(7)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["f.seeds"], after(8)["f.seeds"])
    assert not np.array_equal(one["f.seeds"], after(7, seed=1)["f.seeds"])


def test_clusterings_come_after_epochs_or_after_steps_and_end() -> None:
    cce = encoding(plan(clusterings=2))
    assert [epoch for epoch in range(6) if cce.due(step=epoch * 10, epoch=epoch)] == [1, 2]
    assert not cce.due(step=10, epoch=None)
    cce = replace(cce, every=4)
    assert [step for step in range(1, 30) if cce.due(step, epoch=1)] == [4, 8]
    assert collection(plan()).adapt(step=0, epoch=1) == []


def test_pointers_and_seeds_count() -> None:
    planned = plan(n=1000, budget=20_000)
    parts = planned.bytes_by_part()
    assert parts["f.pointers"] == 4000
    assert parts["f.seeds"] == 32
    rows = (20_000 - 4032) // 32  # of 8 numbers
    assert (parts["f@pointed"], parts["f@hashed"]) == (rows // 2 * 32, (rows - rows // 2) * 32)
    assert planned.nbytes == 4032 + rows * 32
    wide = plan(n=1000, budget=20_000, centroids=1000)
    assert wide.bytes_by_part()["f.pointers"] == 8000
    assert planned.training_nbytes == 0


def test_pointed_rows_stop_at_centroids_and_hashed_rows_take_the_rest() -> None:
    planned = plan(n=100_000, budget="0.3x", dim=16)
    assert encoding(planned).centroids == 256
    assert planned.nbytes > 0.999 * planned.budget


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_budgets_are_used(share: float) -> None:
    planned = et.plan([et.Feature(f"C{i}", n) for i, n in enumerate(CRITEO_LARGE)], "cce", f"{share}x")
    assert 0.99 * planned.budget <= planned.nbytes <= planned.budget


@pytest.mark.parametrize(("options", "pointers"), [({}, 4000), ({"chunks": 1}, 1000), ({"centroids": 257}, 8000)])
def test_the_smallest_form_is_two_rows_and_the_pointers(options: dict, pointers: int) -> None:
    smallest = pointers + 8 * options.get("chunks", 4) + 2 * 8 * 4
    with pytest.raises(et.InfeasibleBudget, match="'cce' cannot fit") as caught:
        plan(n=1000, budget=smallest - 1, **options)
    assert caught.value.min_bytes == smallest
    assert plan(n=1000, budget=smallest, **options).nbytes == smallest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 3}, "chunks must divide dim; got chunks=3, dim=8"),
        ({"centroids": 2**15 + 1}, "centroids must lie in"),
        ({"centroids": 0}, "centroids must lie in"),
        ({"every": -1}, "must not be negative"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**options)


def test_kmeans_against_numpy() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((3000, 3)).astype(np.float32)
    tensor = torch.from_numpy(points)
    found = kmeans(tensor, 10, np.random.default_rng(1))
    distances = ((points[:, None] - found.numpy()[None]) ** 2).sum(2)
    np.testing.assert_array_equal(nearest(tensor, found).numpy(), distances.argmin(1))
    first = ((points[:, None] - points[None, :10]) ** 2).sum(2)  # ten points as they are
    assert distances.min(1).mean() < 0.8 * first.min(1).mean()
    groups = random.integers(0, 4, 3000) * 2  # odd groups are empty
    means, sizes = group_means(tensor, torch.from_numpy(groups), 8)
    for group in range(8):
        chosen = points[groups == group]
        assert sizes[group] == len(chosen)
        np.testing.assert_allclose(means[group], chosen.mean(0) if len(chosen) else np.zeros(3), atol=1e-5)


def test_kmeans_of_one_centroid_is_the_mean_and_of_few_values_the_values() -> None:
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kmeans(points, 1, np.random.default_rng(0)), points.mean(0, keepdim=True))
    values = kmeans(points[:3].repeat(20, 1), 5, np.random.default_rng(0))
    assert values.shape == (5, 2)
    assert torch.equal(values.unique(dim=0), points[:3].unique(dim=0))


def held_out_loss(seed: int, **options: object) -> float:
    """Log loss after three epochs on clicks that depend on a vector per id, drawn around one of 20 centres."""
    random = np.random.default_rng(seed)
    hidden = random.normal(0, 0.8, (20, 8))[random.integers(0, 20, 800)] + random.normal(0, 0.2, (800, 8))
    ids, x = random.integers(0, 800, 50_000), random.standard_normal((50_000, 8))
    clicked = random.random(50_000) < 1 / (1 + np.exp(-(hidden[ids] * x).sum(1)))
    seen, label = torch.from_numpy(x).float(), torch.from_numpy(clicked).float()
    torch.manual_seed(seed)
    planned = plan(n=800, budget="0.3x", seed=seed, chunks=2, **options)
    tables = et.EmbeddingBagCollection(planned, optimizer=et.Optimizer(lr=0.1), init_std=0.1)

    def loss(rows: slice) -> torch.Tensor:
        logits = (tables(single_ids({"f": ids[rows]})).values() * seen[rows]).sum(1)
        return F.binary_cross_entropy_with_logits(logits, label[rows])

    for step in range(240):
        start = step % 80 * 500
        tables.adapt(step, epoch=step // 80 if start == 0 else None)
        loss(slice(start, start + 500)).backward()
    with torch.no_grad():
        return float(loss(slice(40_000, None)))


def test_clustering_beats_the_same_tables_without_it() -> None:
    for seed in range(2):
        assert held_out_loss(seed) < held_out_loss(seed, clusterings=0) - 0.01
