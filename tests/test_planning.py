"""Budgets are never exceeded and well used; requests that make no sense are refused in one line."""

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import CASES, Case, Found

import embtab as et
from embtab.errors import UserError

CRITEO = [
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
]
criteo_features = [et.Feature(f"C{i}", n) for i, n in enumerate(CRITEO, start=1)]
SIMPLE = [case for case in CASES if case.name != "mixed" and case.counts is None and not isinstance(case, Found)]


@pytest.mark.parametrize("case", SIMPLE, ids=lambda case: case.name)
@settings(max_examples=100)
@given(
    cardinalities=st.lists(st.integers(1, 10) | st.integers(1, 10**7), min_size=1, max_size=12),
    dim=st.sampled_from([4, 8, 16, 64]),
    share=st.floats(1e-4, 1.5),
)
def test_no_plan_exceeds_its_budget(case: Case, cardinalities: list[int], dim: int, share: float) -> None:
    features = [et.Feature(f"f{i}", n) for i, n in enumerate(cardinalities)]
    dense = sum(cardinalities) * dim * 4
    budget = max(int(share * dense), 1)
    try:
        plan = et.plan(features, case.method, budget, dim)
    except et.InfeasibleBudget as error:
        assert error.min_bytes > budget
        assert et.plan(features, case.method, error.min_bytes, dim).nbytes <= error.min_bytes
        with pytest.raises(et.InfeasibleBudget):
            et.plan(features, case.method, error.min_bytes - 1, dim)
        return
    assert plan.nbytes <= budget
    arrays = [array for e in plan.encodings.values() for array in e.arrays().values() if array.serving]
    assert plan.nbytes == sum(table.num_rows * table.width * 4 for table in plan.tables.values()) + sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays
    )
    if dense <= budget:
        assert plan.nbytes == dense
    elif case.name.startswith(("hash", "unified", "cafe")) and budget >= 50 * dim * 4 * len(features):
        assert plan.nbytes >= 0.9 * budget


@settings(max_examples=60)
@given(
    methods=st.lists(st.sampled_from(["dense", "hash", "unified", "qr"]), min_size=4, max_size=4),
    share=st.floats(0.001, 1.2),
)
def test_mixtures_keep_the_budget_too(methods: list[str], share: float) -> None:
    sizes = [5, 300, 20_000, 700_000]
    features = [et.Feature(f"f{i}", n) for i, n in enumerate(sizes)]
    budget = int(share * sum(sizes) * 64)
    assume(budget > 0)
    try:
        plan = et.plan(features, {f"f{i}": m for i, m in enumerate(methods)}, budget)
    except et.InfeasibleBudget as error:
        assert error.min_bytes > budget
        return
    assert plan.nbytes <= budget
    assert all(plan.encoding(f"f{i}").method in (m, "dense") for i, m in enumerate(methods))


@pytest.mark.parametrize("method", ["hash", "unified", "qr", {"name": "qr", "op": "concat"}])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_budgets_are_used_on_the_criteo_cardinalities(method: object, share: float) -> None:
    plan = et.plan(criteo_features, method, f"{share}x")
    assert plan.budget == int(share * 33_762_577 * 64)
    assert 0.9 * plan.budget <= plan.nbytes <= plan.budget


def test_features_that_would_not_shrink_stay_dense() -> None:
    plan = et.plan(criteo_features, "qr", "0.1x")
    assert plan.encoding("C9").method == "dense"  # three ids
    assert plan.encoding("C3").method == "qr"


def test_qr_reaches_two_square_roots_and_says_so_when_asked_for_less() -> None:
    million = [et.Feature("f", 10**6)]
    smallest = 2000 * 16 * 4
    assert et.plan(million, {"name": "qr", "op": "sum"}, smallest).nbytes == smallest
    with pytest.raises(et.InfeasibleBudget, match="needs 128 kB") as caught:
        et.plan(million, {"name": "qr", "op": "sum"}, smallest - 1)
    assert caught.value.min_bytes == smallest
    assert isinstance(caught.value, ValueError)


def test_renaming_or_reordering_other_features_moves_no_hash() -> None:
    a, b, c = et.Feature("a", 1000), et.Feature("b", 2000), et.Feature("c", 2000)
    one = et.plan([a, b], "unified", 20_000).encoding("b")
    two = et.plan([c, b, a], "unified", 20_000).encoding("b")
    assert one == two


def test_description_names_every_feature_and_the_total() -> None:
    text = et.plan(criteo_features, "unified", "8MB").describe()
    assert all(f"C{i} " in text for i in range(1, 27))
    assert "budget 8 MB" in text
    assert "@unified8: 8 MB" in text


def test_a_feature_may_have_a_precision_of_its_own() -> None:
    """Shared tables are then kept apart, and the plan's own precision is for those that name none."""
    features = [et.Feature("a", 1000), et.Feature("b", 3000), et.Feature("c", 30)]
    wanted = {
        "a": {"name": "unified", "precision": "int8"},
        "b": "unified",
        "c": {"name": "dense", "precision": "fp32"},
    }
    plan = et.plan(features, wanted, "0.2x", precision="int4")
    assert {space: {plan.tables[t].precision for t in e.tables} for space, e in plan.encodings.items()} == {
        "a": {"int8"},
        "b": {"int4"},
        "c": {"fp32"},
    }
    assert 0.95 * plan.budget <= plan.nbytes <= plan.budget
    assert plan.precision == "mixed"
    assert et.plan(features, "qr", "0.2x", precision="int8") == et.plan(
        features, {"name": "qr", "precision": "int8"}, "0.2x"
    )


a, b = et.Feature("a", 10), et.Feature("b", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hsah"}, "unknown method 'hsah'; there are dense, hash"),
        ({"method": {"name": "qr", "opp": "sum"}}, "method 'qr' has no option 'opp'; it has op, precision"),
        ({"method": {"name": "qr", "op": 2}}, "method 'qr': option op must be str, got 2"),
        ({"method": {"name": "lowrank", "bias": "no"}}, "method 'lowrank': option bias must be bool, got 'no'"),
        ({"method": {"name": "dhe", "layers": True}}, "method 'dhe': option layers must be int, got True"),
        ({"method": {"name": "robe", "chunk": 2.0}}, "option chunk must be int or null, got 2.0"),
        ({"method": {"name": "qr", "precision": "int3"}}, "method 'qr': unknown precision 'int3'; there are fp32"),
        ({"method": {"name": "qr", "op": "max"}, "budget": "0.5x"}, "op must be one of concat, sum, product"),
        ({"method": "unified", "chunks": 3, "budget": "0.5x"}, "chunks must divide dim; got chunks=3, dim=16"),
        ({"method": {"a": "hash"}}, "says nothing of feature 'b'"),
        ({"method": {"x": "hash", "*": "qr"}}, "names a feature 'x' that is not there"),
        ({"method": {"*": "qr"}, "op": "sum"}, "options op need one method"),
        ({"budget": 0}, "budget 0 is 0 bytes; it must be above zero"),
        ({"budget": -5}, "must be above zero"),
        ({"budget": "8 apples"}, "budget '8 apples' is not a size"),
        ({"budget": float("nan")}, "is not a size"),
        ({"dim": 0}, "dim must be a positive whole number"),
        ({"features": []}, "needs at least one feature"),
        ({"features": [a, a]}, "feature 'a' is listed twice"),
        ({"features": [et.Feature("a", 10, id_space="s"), et.Feature("b", 11, id_space="s")]}, "need equal num_ids"),
    ],
)
def test_requests_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        et.plan(**{"features": [a, b], "method": "dense", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 3), "needs a name"),
        (("a", 0), "num_ids must be a positive whole number"),
        (("a", 2.5), "num_ids must be a positive whole number"),
        (("a", 3, "max"), "pooling must be one of"),
        (("a", 3, "sum", np.ones(4)), r"counts must have shape \(3,\)"),
        (("a", 3, "sum", None, 5), "id_space must be a name, got 5"),
    ],
)
def test_features_that_make_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        et.Feature(*arguments)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("8MB", 8_000_000),
        ("8MiB", 8_388_608),
        ("1.5 kB", 1500),
        ("1_000", 1000),
        ("0.1x", 10),
        (12.0, 12),
        ("2gb", 2e9),
    ],
)
def test_sizes(size: object, nbytes: int) -> None:
    from embtab.sizes import parse_bytes

    assert parse_bytes(size, dense_bytes=100) == nbytes


def test_a_table_that_would_carry_the_name_of_an_array_is_refused() -> None:
    features = [et.Feature("user", 5000), et.Feature("user.projection", 9)]
    with pytest.raises(UserError, match=r"feature 'user' has an array 'projection', so no table may be called user\.p"):
        et.plan(features, {"user": "lowrank", "*": "dense"}, "0.5x")


def test_a_feature_that_a_plan_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match="no feature 'film' in this plan; it has user, item"):
        et.plan([et.Feature("user", 9), et.Feature("item", 9)]).encoding("film")


def renamed(described: dict, old: str, new: str) -> None:
    next(table for table in described["tables"] if table["name"] == old)["name"] = new


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("tables"), "not a plan: 'tables'"),
        (lambda d: d["tables"][0].update(colour="red"), "not a plan: .*colour"),
        (lambda d: d["encodings"]["user"].update(method="magic"), "unknown method 'magic'"),
        (lambda d: d["encodings"]["user"].update(colour="red"), "not a plan: .*colour"),
        (lambda d: renamed(d, "item", "user"), "two physical tables would be called 'user'"),
        (lambda d: renamed(d, "item", "film"), "feature 'item' reads a table 'item' that the plan does not have"),
    ],
)
def test_descriptions_that_are_no_plan(spoil: Callable[[dict], None], message: str) -> None:
    plan = et.plan([et.Feature("user", 9), et.Feature("item", 9)], "hash", "0.9x")
    described = plan.to_dict()
    assert et.Plan.from_dict(described) == plan
    spoil(described)
    with pytest.raises(UserError, match=message):
        et.Plan.from_dict(described)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_ids": 2**63}, "feature 'f': num_ids must be a positive whole number below 2^63, got 92233720"),
        ({"num_ids": 2**70}, "feature 'f': num_ids must be a positive whole number below 2^63"),
        ({"num_ids": 3.0}, "feature 'f': num_ids must be a positive whole number"),
        ({"counts": [1, 1.5, 2]}, "feature 'f': the count of id 1 is 1.5; counts must be whole numbers"),
        ({"counts": [1, 2, -1]}, "feature 'f': the count of id 2 is -1; counts must be whole numbers"),
        ({"counts": [1, float("nan"), 1]}, "feature 'f': the count of id 1 is nan"),
        ({"counts": np.array([1, 2**63, 3], np.uint64)}, "feature 'f': the count of id 1 is 9223372036854775808"),
        ({"counts": ["1", "2", "3"]}, "feature 'f': counts must be whole numbers, got <U1"),
    ],
)
def test_features_that_cannot_be_are_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        et.Feature(**{"name": "f", "num_ids": 3, **changed})
    assert str(raised.value).startswith(message)


def test_counts_may_be_whole_floats_and_numbers_numpys() -> None:
    feature = et.Feature("f", np.int64(3), counts=np.array([3.0, 0.0, 2.0]))
    assert feature.counts is not None
    assert (feature.counts.dtype, feature.counts.tolist()) == (np.int64, [3, 0, 2])
    made = et.plan([et.Feature("f", 1000)], "hash", np.int64(6400), np.int32(16), np.uint8(3))
    assert made == et.plan([et.Feature("f", 1000)], "hash", 6400, 16, 3)
    assert et.Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: et.plan(et.Feature("f", 3)), "features must be a list of embtab.Feature, got Feature"),
        (lambda: et.plan("f"), "features must be a list of embtab.Feature, got str"),
        (lambda: et.plan([("f", 3)]), "one of them is ('f', 3)"),
        (lambda: et.plan([et.Feature("f", 3)], seed="0"), "seed must be a whole number, got '0'"),
        (lambda: et.EmbeddingBagCollection([et.Feature("f", 3)]), "tables are made from a plan"),
        (lambda: et.EmbeddingCollection(et.Feature("f", 3)), "tables are made from a plan"),
        (lambda: tables(optimizer="adam"), "optimizer must be an embtab.Optimizer"),
        (lambda: tables(optimizer=torch.optim.Adam), "optimizer must be an embtab.Optimizer"),
        (lambda: tables("native", optimizer="adam"), "optimizer must be an embtab.Optimizer"),
        (lambda: tables(device="gpu"), "device 'gpu' cannot be used here"),
        (lambda: tables("torch", device=3.5), "device 3.5 cannot be used here"),
        (lambda: tables("torch", device="cuda:77"), "device 'cuda:77' cannot be used here"),
    ],
)
def test_what_is_of_another_kind_is_refused_in_a_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        make()
    assert "\n" not in str(raised.value)


def tables(backend: str = "fbgemm", **options: object) -> object:
    return et.EmbeddingBagCollection(et.plan([et.Feature("f", 3)]), backend, **options)


@pytest.mark.parametrize("method", ["hash", "robe", "unified"])
def test_a_hash_that_is_full_before_the_budget_says_so(method: str) -> None:
    plan = et.plan([et.Feature("big", 10**11), et.Feature("small", 10)], method, "0.1x", 16)
    (note,) = [line for line in plan.describe().splitlines() if line.startswith("note:")]
    unused = 1 - plan.nbytes / plan.budget
    assert unused > 0.5
    assert note.startswith("note: 'big'")
    assert f"so {unused:.0%} of the budget stays unused" in note
    assert "note:" not in et.plan([et.Feature("big", 10**7)], method, "0.1x", 16).describe()
