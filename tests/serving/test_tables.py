"""Tables for serving: every method, precision and form gives the NumPy reader's vectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from laws import CASES, FEATURES, Bags, Case, adapted, single_ids
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.bundle.quantised import QuantisedCollection, torchrec_collection
from embtab.errors import UserError
from embtab.methods import PRECISIONS
from embtab.reader import Bundle
from embtab.serving import exported
from embtab.serving.capture import captured
from embtab.serving.quantised import QuantisedTables
from embtab.serving.tables import ServedTables

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def bundle(case: Case, path: Path, precision: str = "fp32") -> Bundle:
    torch.manual_seed(0)
    tables = adapted(et.EmbeddingBagCollection(case.plan(), backend="torch", init_std=1.0))
    et.save(tables, path, precision=precision)
    return Bundle(path)


def largest(found: exported.Arrays, expected: exported.Arrays) -> float:
    """The largest difference, in units of the largest number where that is above one."""
    size = max(1.0, *(float(np.abs(array).max(initial=0)) for array in expected.values()))
    return max(float(np.abs(found[name] - array).max(initial=0)) for name, array in expected.items()) / size


@every_case
def test_bags_and_weights_are_the_readers_in_every_precision(case: Case, tmp_path: Path) -> None:
    for precision in PRECISIONS:
        opened = bundle(case, tmp_path / precision, precision)
        for module in (ServedTables(opened, weighted=True), QuantisedTables(opened, weighted=True)):
            given = exported.made_inputs(module, 100, np.random.default_rng(0))
            expected = exported.outputs_of(module, opened, given)
            assert list(expected) == [f"vectors.{feature.name}" for feature in FEATURES]
            assert largest(exported.eager(module)(given), expected) < 1e-6


@every_case
def test_stacked_ids_are_the_readers_in_every_precision(case: Case, tmp_path: Path) -> None:
    for precision in PRECISIONS:
        opened = bundle(case, tmp_path / precision, precision)
        for module in (ServedTables(opened, stacked=True), QuantisedTables(opened, stacked=True)):
            for rows in (100, 1, 0):
                given = exported.made_inputs(module, 100, np.random.default_rng(0))
                given = {"ids": given["ids"][:rows]}
                expected = np.stack(
                    [opened.vectors(feature.name, given["ids"][:, k]) for k, feature in enumerate(FEATURES)], axis=1
                )
                found = exported.eager(module)(given)
                assert list(found) == ["vectors"]
                assert largest(found, {"vectors": expected}) < 1e-6


@every_case
def test_columns_of_ids_are_stacked_ids(case: Case, tmp_path: Path) -> None:
    opened = bundle(case, tmp_path / "b")
    stacked, apart = ServedTables(opened, stacked=True), ServedTables(opened, single=opened.features)
    ids = torch.from_numpy(exported.made_inputs(stacked, 50, np.random.default_rng(0))["ids"])
    columns = {f"ids.{name}": ids[:, k] for k, name in enumerate(opened.features)}
    with torch.no_grad():
        torch.testing.assert_close(stacked.of_batch({"ids": ids}), apart.of_batch(columns), rtol=1e-6, atol=1e-6)


def test_a_program_of_ones_own_has_no_operators_of_ours(tmp_path: Path) -> None:
    """What marks values for our exports stays out of a plain torch.export."""
    module = ServedTables(bundle(next(case for case in CASES if case.name == "unified"), tmp_path / "b"), stacked=True)
    ids = torch.from_numpy(exported.made_inputs(module, 4, np.random.default_rng(0))["ids"])
    program = torch.export.export(module, ({"ids": ids},), strict=False)
    assert not [node for node in program.graph.nodes if str(node.target).startswith("embtab")]
    marked = captured(module, {"ids": ids})
    assert [node for node in marked.graph.nodes if str(node.target).startswith("embtab.in_memory")]


@pytest.mark.slow
@every_case
def test_every_backend_gives_the_readers_vectors_on_1e5_ids(case: Case, tmp_path: Path) -> None:
    """Torch and fbgemm as they train, and the modules that serve; bags, weights and extreme ids."""
    opened = bundle(case, tmp_path / "b")
    served = [ServedTables(opened, weighted=True), QuantisedTables(opened, weighted=True)]
    given = exported.made_inputs(served[0], 40_000, np.random.default_rng(2))  # 2.5 ids a bag
    expected = exported.outputs_of(served[0], opened, given)
    for module in served:
        assert largest(exported.eager(module)(given), expected) < 1e-6
    each = {what: [given[f"{what}.{feature.name}"] for feature in FEATURES] for what in ("ids", "offsets", "weights")}
    kjt = KeyedJaggedTensor(
        [feature.name for feature in FEATURES],
        torch.from_numpy(np.concatenate(each["ids"])),
        lengths=torch.from_numpy(np.concatenate([np.diff(offsets) for offsets in each["offsets"]])),
        weights=torch.from_numpy(np.concatenate(each["weights"])),
    )
    for backend in ("torch", "fbgemm"):
        found = et.load(tmp_path / "b", backend).eval()(kjt).to_dict()
        assert (
            largest({f"vectors.{name}": vectors.detach().numpy() for name, vectors in found.items()}, expected) < 1e-6
        )


@every_case
def test_quantised_rows_are_not_quantised_again(case: Case, tmp_path: Path) -> None:
    """Bit for bit where vectors are rows side by side; combined ones differ by the order of sums at most."""
    exact = case.name not in ("tt", "dhe") and not case.name.startswith(("lowrank", "mixed_dim"))
    for precision in ("int8", "int4", "fp16"):
        opened = bundle(case, tmp_path / precision, precision)
        ids = {f.name: np.random.default_rng(1).integers(0, f.num_ids, 500) for f in FEATURES}
        found = QuantisedCollection(opened)(single_ids(ids)).to_dict()
        for name, each in ids.items():
            expected = opened.vectors(name, each)
            np.testing.assert_allclose(found[name], expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_quantised_tables_take_keyed_jagged_tensors(tmp_path: Path) -> None:
    opened = bundle(next(case for case in CASES if case.name == "unified"), tmp_path / "b", "int8")
    bags = Bags({f.name: [[(1, 0.5), (2, -1.0)], [], [(2, 2.0)] * 3] for f in FEATURES})
    module = QuantisedCollection(tmp_path / "b")
    for weighted in (True, False):
        found = module(bags.kjt(weighted))
        for name in opened.features:
            ids, offsets, weights = bags.arrays(name)
            expected = opened.lookup(name, ids, offsets, weights if weighted else None)
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
    with pytest.raises(UserError, match="'colour' is not in the batch"):
        module(KeyedJaggedTensor(["shop"], torch.tensor([1]), lengths=torch.tensor([1])))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_torchrecs_own_quantised_collection_has_the_readers_vectors(precision: str, tmp_path: Path) -> None:
    features = [et.Feature("user", 300), et.Feature("item", 90, pooling="mean"), et.Feature("other", 300)]
    tables = et.EmbeddingBagCollection(et.plan(features, dim=8), "torch", init_std=1.0)
    et.save(tables, tmp_path / "b", precision=precision)
    opened, module = Bundle(tmp_path / "b"), torchrec_collection(tmp_path / "b")
    ids = {f.name: np.random.default_rng(0).integers(0, f.num_ids, 200) for f in features}
    for sizes in ([1] * 200, [3, 0, 197]):
        lengths = torch.tensor(sizes * 3, dtype=torch.int32)
        kjt = KeyedJaggedTensor(list(ids), torch.from_numpy(np.concatenate(list(ids.values()))), lengths=lengths)
        found = module(kjt).to_dict()
        for name, each in ids.items():
            expected = opened.lookup(name, each, np.cumsum([0, *sizes]))
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=0 if len(sizes) == 200 else 1e-4)


@pytest.mark.parametrize(
    ("features", "method", "dim", "match"),
    [
        ([et.Feature("user", 900)], "hash", 8, "'user' is hash"),
        ([et.Feature("seen", 9, pooling="none")], "dense", 8, "'seen': .* needs one pooling"),
        ([et.Feature("a", 9, id_space="x"), et.Feature("b", 9, pooling="mean", id_space="x")], "dense", 8, "'x': "),
        ([et.Feature("user", 9)], "dense", 6, "a width of 6 is none"),
    ],
)
def test_what_torchrecs_collection_cannot_hold_is_refused(
    features: list[et.Feature], method: str, dim: int, match: str, tmp_path: Path
) -> None:
    plan = et.plan(features, method, "0.5x" if method == "hash" else None, dim)
    et.save(et.EmbeddingCollection(plan, "torch"), tmp_path / "b")
    with pytest.raises(UserError, match=match):
        torchrec_collection(tmp_path / "b")


def test_histories_keep_a_vector_per_id(tmp_path: Path) -> None:
    plan = et.plan([et.Feature("item", 500), et.Feature("seen", 500, pooling="none")], "hash", "0.3x", precision="int8")
    et.save(et.EmbeddingCollection(plan, backend="torch", init_std=1.0), tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    kjt = KeyedJaggedTensor(["item", "seen"], torch.arange(7), lengths=torch.tensor([1, 1, 0, 5]))
    found = QuantisedCollection(opened)(kjt)
    np.testing.assert_array_equal(found["seen"].values(), opened.vectors("seen", np.arange(2, 7)))
    np.testing.assert_array_equal(found["seen"].lengths(), [0, 5])


@pytest.mark.parametrize("method", ["dense", "qr", "tt", {"name": "mixed_dim", "blocks": 4}], ids=str)
@pytest.mark.parametrize("wrong", [-1, 60, 2**40, 2**63 - 1, -(2**63)])
def test_an_id_out_of_range_is_an_error(method: object, wrong: int, tmp_path: Path) -> None:
    counted = {"user": 60 - np.arange(60), "item": 90 - np.arange(90)}
    features = [et.Feature(name, len(counts), counts=counts) for name, counts in counted.items()]
    plan = et.plan(features, method, None if method == "dense" else "0.6x", dim=8)
    et.save(et.EmbeddingBagCollection(plan, backend="torch"), tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    given = {"ids.user": torch.tensor([3, wrong]), "ids.item": torch.tensor([3, 4])}
    with pytest.raises((IndexError, RuntimeError)):
        ServedTables(opened, single=["user", "item"])(given)
    with pytest.raises(UserError, match=rf"'user': id {wrong} is outside \[0, 60\)"):
        QuantisedTables(opened, single=["user", "item"])(given)
    with pytest.raises(UserError, match="no feature 'nobody'"):
        ServedTables(opened, single=["nobody"])
