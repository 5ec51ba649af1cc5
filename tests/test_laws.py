"""The laws every method keeps on every backend. A method is added to them by one row in laws.CASES."""

from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CASES, DIM, EXTREMES, FEATURES, Bags, Case, adapted, batches, single_ids, tables_of
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.reader import read as reader

BACKENDS = ["torch", "fbgemm", "native"]
LR = 0.01  # small, because products of parts diverge soon
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@cache
def plan_of(case: Case) -> et.Plan:
    return case.plan()


@cache
def bag_collection(case: Case, backend: str) -> et.EmbeddingBagCollection:
    """A collection that no test trains."""
    torch.manual_seed(0)
    return adapted(et.EmbeddingBagCollection(case.plan(), backend=backend, init_std=1.0))


@cache
def sequence_collection(case: Case, backend: str) -> et.EmbeddingCollection:
    torch.manual_seed(0)
    return adapted(et.EmbeddingCollection(case.plan(), backend=backend, init_std=1.0))


@cache
def every_vector(case: Case, backend: str, count: int) -> dict[str, torch.Tensor]:
    """The vectors of ids 0 to count - 1, of features that have so many."""
    ids = single_ids({f.name: np.arange(count) % f.num_ids for f in FEATURES})
    return {name: vectors.detach() for name, vectors in bag_collection(case, backend)(ids).to_dict().items()}


@every_case
@settings(max_examples=40)
@given(data=st.data())
def test_pooled_vectors_are_what_numpy_computes_from_the_definition(case: Case, data) -> None:
    plan = plan_of(case)
    bags, weighted = data.draw(batches(plan)), data.draw(st.booleans())
    for backend in BACKENDS:
        collection = bag_collection(case, backend)
        pooled = collection(bags.kjt(weighted)).to_dict()
        tables = tables_of(collection)
        for feature in plan.features:
            ids, offsets, weights = bags.arrays(feature.name)
            expected = reader.lookup(plan.to_dict(), tables, feature.name, ids, offsets, weights if weighted else None)
            found = pooled[feature.name].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5, err_msg=backend)


@every_case
@settings(max_examples=20)
@given(data=st.data())
def test_sequences_keep_one_vector_per_id(case: Case, data) -> None:
    plan = plan_of(case)
    bags = data.draw(batches(plan))
    for backend in BACKENDS:
        collection = sequence_collection(case, backend)
        outputs, tables = collection(bags.kjt(weighted=False)), tables_of(collection)
        assert list(outputs) == [feature.name for feature in plan.features]
        for name, jagged in outputs.items():
            ids, offsets, _ = bags.arrays(name)
            expected = reader.vectors(plan.to_dict(), tables, name, ids)
            found = jagged.values().detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5, err_msg=backend)
            np.testing.assert_array_equal(jagged.lengths().numpy(), np.diff(offsets), err_msg=backend)


@every_case
@settings(max_examples=15)
@given(data=st.data())
def test_a_collection_is_its_dense_materialisation(case: Case, data) -> None:
    """Read every row once, give the rows to torch's own embedding bag, and nothing differs."""
    bags = data.draw(batches(plan_of(CASES[0])))  # ids in range, so that they are rows of a dense table
    for backend in BACKENDS:
        collection = bag_collection(case, backend)
        pooled = collection(bags.kjt(weighted=False)).to_dict()
        for feature in FEATURES:
            dense = every_vector(case, backend, feature.num_ids)[feature.name]
            ids, offsets, _ = bags.arrays(feature.name)
            expected = F.embedding_bag(
                torch.from_numpy(ids), dense, torch.from_numpy(offsets), mode=feature.pooling, include_last_offset=True
            )
            torch.testing.assert_close(
                pooled[feature.name], expected, rtol=1e-5, atol=2e-5, msg=partial("{}: {}".format, backend)
            )


@every_backend
@every_case
def test_extreme_ids_are_taken_or_refused_by_name(case: Case, backend: str) -> None:
    plan, collection = case.plan(), bag_collection(case, backend)
    for feature in plan.features:
        for extreme in [*EXTREMES, feature.num_ids]:
            ids = {f.name: np.array([extreme if f is feature else 0]) for f in plan.features}
            if plan.encoding(feature.name).num_ids is None or 0 <= extreme < feature.num_ids:
                expected = reader.vectors(plan.to_dict(), tables_of(collection), feature.name, ids[feature.name])
                got = collection(single_ids(ids))[feature.name].detach().numpy()
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
            else:
                with pytest.raises(UserError, match=f"feature '{feature.name}'.*id {extreme} .*{feature.num_ids}"):
                    collection(single_ids(ids))


@every_case
def test_gradients_are_right_in_double_precision(case: Case) -> None:
    """Autograd's gradients of the torch backend against finite differences, for tables and weights, on bags."""
    small = [et.Feature("colour", 3), et.Feature("items", 40, pooling="mean"), et.Feature("user", 100)]
    collection = et.EmbeddingBagCollection(case.plan(small, dim=4), backend="torch", init_std=1.0).double()
    names = [feature.name for feature in small]
    values = torch.tensor([0, 2, 2, 11, 3, 39, 0, 99, 7])
    lengths = torch.tensor([1, 2, 0, 1, 1, 0, 2, 0, 2])
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    parameters = dict(collection.named_parameters())

    def run(weights: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        batch = KeyedJaggedTensor(names, values, lengths=lengths, weights=weights)
        return torch.func.functional_call(collection, dict(zip(parameters, tables, strict=True)), batch).values()

    assert torch.autograd.gradcheck(run, (weights, *parameters.values()))


@pytest.mark.parametrize("backend", ["fbgemm", "native"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@every_case
def test_the_fused_update_is_the_optimizer_step_on_the_gradient(case: Case, optimizer: str, backend: str) -> None:
    """Three steps of a backend with an optimizer of its own against NumPy's on the torch backend's gradients."""
    plan = case.plan()
    reference = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    fused = et.EmbeddingBagCollection(plan, backend, optimizer=et.Optimizer(optimizer, lr=LR))
    fused.load_state_dict(reference.state_dict(), strict=True)
    moments = {name: np.zeros_like(parameter.detach().numpy()) for name, parameter in reference.named_parameters()}
    random = np.random.default_rng(0)
    for _ in range(3):
        content = {
            f.name: [[(int(i), 1.5) for i in random.integers(0, f.num_ids, n)] for n in (2, 0, 3)] for f in FEATURES
        }
        batch = Bags(content).kjt(weighted=True)
        target = torch.from_numpy(random.standard_normal((3, len(FEATURES) * DIM)).astype(np.float32))
        for collection in (reference, fused):
            collection.zero_grad()
            ((collection(batch).values() - target) ** 2).sum().backward()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            kind = optimizer if name.startswith("lookup.") else "sgd"
            numpy_step(kind, parameter.detach().numpy(), parameter.grad.numpy(), moments[name])
        for parameter in et.outer_parameters(fused):  # projections and the like, which no backend fuses
            assert parameter.grad is not None
            numpy_step("sgd", parameter.detach().numpy(), parameter.grad.numpy(), np.zeros(0))
    for name, table in tables_of(reference).items():
        np.testing.assert_allclose(tables_of(fused)[name], table, rtol=2e-4, atol=2e-5, err_msg=name)


def numpy_step(optimizer: str, weight: np.ndarray, gradient: np.ndarray, moment: np.ndarray) -> None:
    """One step in place, from the optimizers' definitions."""
    if optimizer == "sgd":
        weight -= LR * gradient
        return
    moment += gradient**2 if optimizer == "adagrad" else (gradient**2).mean(axis=1, keepdims=True)
    weight -= LR * gradient / (np.sqrt(moment) + 1e-8)


@every_case
def test_composed_rows_start_with_the_dense_tables_mean_and_variance(case: Case) -> None:
    std, seeds = 0.03, 16  # small tables of parts have few independent entries: pool over seeds
    features = [et.Feature("colour", 300), et.Feature("items", 500), et.Feature("user", 2000)]
    everything = single_ids({f.name: np.arange(2000) % f.num_ids for f in features})
    drawn: dict[str, list[torch.Tensor]] = {f.name: [] for f in features}
    for seed in range(seeds):
        torch.manual_seed(seed)
        collection = et.EmbeddingBagCollection(case.plan(features, dim=64, seed=seed), backend="torch", init_std=std)
        for name, vectors in collection(everything).to_dict().items():
            drawn[name].append(vectors.detach())
    for entries in map(torch.cat, drawn.values()):
        assert float(entries.std()) == pytest.approx(std, rel=0.1)
        assert abs(float(entries.mean())) < 0.1 * std


@every_case
def test_plans_and_tables_come_back_as_they_were(case: Case) -> None:
    plan = case.plan()
    assert et.Plan.from_dict(plan.to_dict()) == plan
    torch.manual_seed(1)
    written = et.EmbeddingBagCollection(plan, backend="fbgemm")
    read = et.EmbeddingBagCollection(et.Plan.from_dict(plan.to_dict()), backend="torch")
    read.load_state_dict(written.state_dict())
    ids = single_ids({f.name: np.arange(40) % f.num_ids for f in plan.features})
    assert torch.equal(written(ids).values(), read(ids).values())


@every_case
def test_bytes_are_those_of_the_tables_that_exist(case: Case) -> None:
    collection = bag_collection(case, "torch")
    assert case.plan().nbytes == sum(table.nbytes for table in tables_of(collection).values())
    assert case.plan().budget is None or case.plan().nbytes <= case.plan().budget


@every_case
def test_the_order_of_features_moves_nothing(case: Case) -> None:
    """A new order, in the plan and in the batch, gives the same vectors."""
    plan, shuffled = case.plan(), case.plan(FEATURES[::-1])
    torch.manual_seed(2)
    collection = et.EmbeddingBagCollection(plan, backend="torch")
    other = et.EmbeddingBagCollection(shuffled, backend="torch")
    other.load_state_dict(collection.state_dict())
    ids = {f.name: np.arange(30) * 7 % f.num_ids for f in FEATURES}
    ordered, reordered = collection(single_ids(ids)).to_dict(), other(single_ids(ids)).to_dict()
    for feature in FEATURES:
        torch.testing.assert_close(ordered[feature.name], reordered[feature.name])


@every_case
def test_features_of_one_id_space_share_vectors(case: Case) -> None:
    ids = {f.name: np.arange(30) % f.num_ids for f in FEATURES}
    vectors = bag_collection(case, "torch")(single_ids(ids)).to_dict()
    torch.testing.assert_close(vectors["item"], vectors["seen"])


@every_backend
@every_case
def test_a_batch_without_any_id_gives_zeros(case: Case, backend: str) -> None:
    content: dict[str, list[list[tuple[int, float]]]] = {f.name: [[], []] for f in FEATURES}
    pooled = bag_collection(case, backend)(Bags(content).kjt(weighted=False)).values()
    assert torch.equal(pooled, torch.zeros(2, len(FEATURES) * DIM))
    assert all(len(v.values()) == 0 for v in sequence_collection(case, backend)(Bags(content).kjt(False)).values())
