"""The rule of method="auto", case by case."""

import numpy as np
import pytest

import embtab as et
from embtab.errors import UserError
from embtab.planning.auto import effective_ids

ZIPF = (1e7 / np.arange(1, 100_001)).astype(np.int64)


def methods(plan: et.Plan) -> dict[str, str]:
    return {space: encoding.method for space, encoding in plan.encodings.items()}


def precisions(plan: et.Plan) -> set[str]:
    return {table.precision for table in plan.tables.values()}


@pytest.mark.parametrize(
    ("budget", "large", "small"),
    [
        (None, "fp32", "fp32"),
        ("1x", "fp32", "fp32"),
        ("0.9x", "int8", "fp32"),  # int8 takes 20 of 64 bytes
        (20 * 1005 + 5 * 44, "int8", "fp32"),
        (20 * 1005 + 5 * 44 - 1, "int8", "int8"),
        (20 * 1005, "int8", "int8"),
        ("0.31x", "int4", "fp32"),  # int4 takes 12
        (12 * 1005 + 5 * 8, "int4", "int8"),
        (12 * 1005, "int4", "int4"),
    ],
)
def test_dense_while_it_fits_in_any_precision(budget: int | str | None, large: str, small: str) -> None:
    plan = et.plan([et.Feature("a", 1000), et.Feature("b", 5)], "auto", budget)
    assert methods(plan) == {"a": "dense", "b": "dense"}
    assert {name: table.precision for name, table in plan.tables.items()} == {"a": large, "b": small}


@pytest.mark.parametrize(("budget", "structure"), [("0.15x", "lowrank"), ("0.05x", "qr"), (5_500, "partitions")])
def test_structure_where_most_ids_matter_and_hashes_where_few_do(budget: str | int, structure: str) -> None:
    even, skewed = et.Feature("even", 100_000, counts=np.full(100_000, 9)), et.Feature("skewed", 100_000, counts=ZIPF)
    plan = et.plan([even, skewed, et.Feature("gender", 3)], "auto", budget)
    assert methods(plan) == {"even": structure, "skewed": "unified", "gender": "dense"}
    assert {name: table.precision == "int4" for name, table in plan.tables.items()} == {
        name: name != "gender" for name in plan.tables
    }


def test_without_counts_all_ids_matter() -> None:
    assert methods(et.plan([et.Feature("f", 100_000)], "auto", "0.05x")) == {"f": "qr"}


@pytest.mark.parametrize("budget", ["0.5x", "0.1x", "0.02x", "0.003x", 200])
@pytest.mark.parametrize("precision", [None, "fp32", "fp16", "int8"])
def test_any_budget_is_kept_in_the_precision_asked_for(budget: str | int, precision: str | None) -> None:
    features = [et.Feature("a", 30_000, counts=ZIPF[:30_000]), et.Feature("b", 7000), et.Feature("c", 40)]
    plan = et.plan(features, "auto", budget, precision=precision)
    assert plan.budget is not None
    assert plan.nbytes <= plan.budget
    assert precision is None or precisions(plan) == {precision}


def test_too_small_a_budget_says_what_would_do() -> None:
    features = [et.Feature("a", 3000), et.Feature("b", 700)]
    with pytest.raises(et.InfeasibleBudget) as caught:
        et.plan(features, "auto", 5)
    assert et.plan(features, "auto", caught.value.min_bytes).nbytes <= caught.value.min_bytes


def test_auto_decides_alone() -> None:
    with pytest.raises(UserError, match="'auto' has no option 'op'"):
        et.plan([et.Feature("a", 100)], "auto", "0.5x", op="sum")
    with pytest.raises(UserError, match="unknown method 'auto'"):
        et.plan([et.Feature("a", 100)], {"a": "auto"}, "0.5x")


def test_effective_ids_are_a_perplexity() -> None:
    assert effective_ids(et.Feature("f", 4, counts=np.array([5, 5, 5, 5]))) == pytest.approx(4)
    assert effective_ids(et.Feature("f", 4, counts=np.array([7, 0, 0, 0]))) == pytest.approx(1)
    assert effective_ids(et.Feature("f", 3, counts=np.array([2, 1, 1]))) == pytest.approx(2**1.5)
    assert effective_ids(et.Feature("f", 4, counts=np.zeros(4))) == 4
    rank = np.arange(1, 100_001)
    harmonic = (1 / rank).sum()
    zipf = harmonic * np.exp((np.log(rank) / rank).sum() / harmonic)
    assert effective_ids(et.Feature("f", 100_000, counts=ZIPF)) == pytest.approx(zipf, rel=1e-2)
