"""The evolution: a budget no candidate exceeds, parents nobody changes, a best that never gets worse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embtab as et
from embtab.learned.evolution import Candidate, Evolution, Genes

ROWS = np.array([5, 400, 30, 1000])
BYTES = ROWS[:, None] * 4 * np.arange(9)


def genes(share: float = 0.5) -> Genes:
    return Genes(BYTES, int(share * BYTES[:, -1].sum()), "optembed")


def score(candidate: Candidate) -> float:
    """Rewards wide small tables, so that the optimum is inside the budget's edge."""
    return float(sum(np.log(1 + width) / np.sqrt(rows) for width, rows in zip(candidate, ROWS, strict=True)))


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), share=st.floats(0.125, 1.1), chance=st.floats(0, 1))
def test_children_are_within_budget_and_range_and_parents_stay(seed: int, share: float, chance: float) -> None:
    space, random = genes(share), np.random.default_rng(seed)
    one, other = space.drawn(random), space.drawn(random)
    kept = (tuple(one), tuple(other))
    for child in (one, other, space.mutated(one, chance, random), space.crossed(one, other, random)):
        assert all(1 <= width <= 8 for width in child)
        assert space.size(child) == sum(4 * r * w for r, w in zip(ROWS, child, strict=True)) <= space.budget
    assert (one, other) == kept
    assert space.mutated(one, 0.0, random) == one


def test_without_a_budget_to_keep_a_crossed_gene_is_one_of_its_parents() -> None:
    space, random = genes(1.0), np.random.default_rng(0)
    one, other = (1, 2, 3, 4), (5, 6, 7, 8)
    children = {space.crossed(one, other, random) for _ in range(100)}
    assert children == {(1, 6, 7, 8), (1, 2, 7, 8), (1, 2, 3, 8)}  # the point lies between two genes


def test_mutation_reaches_every_width() -> None:
    """The published code can never mutate a width to 1."""
    space, random = genes(1.0), np.random.default_rng(0)
    seen = {space.mutated((4, 4, 4, 4), 1.0, random)[0] for _ in range(200)}
    assert seen == set(range(1, 9))


def test_the_best_never_gets_worse_and_is_what_was_measured() -> None:
    evolution, best = Evolution(genes(), seed=3), []
    asked: list[Candidate] = []

    def evaluate(candidate: Candidate) -> float:
        asked.append(candidate)
        return score(candidate)

    for _ in range(12):
        before = dict(evolution.fitness)
        evolution.step(evaluate)
        best.append(evolution.fitness[evolution.best()[0]])
        assert all(evolution.fitness[c] == fitness for c, fitness in before.items())
    assert best == sorted(best)
    assert best[-1] > best[0]
    assert len(asked) == len(set(asked))  # nothing is measured twice
    assert all(score(c) == fitness for c, fitness in evolution.fitness.items())
    every = [(a, b, c, d) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9) for d in range(1, 9)]
    optimum = max(score(one) for one in every if evolution.genes.size(one) <= evolution.genes.budget)
    assert best[-1] >= 0.98 * optimum


def test_an_evolution_taken_up_again_is_the_same() -> None:
    whole, first, second = (Evolution(genes(), seed=1) for _ in range(3))
    for _ in range(6):
        whole.step(score)
    for _ in range(3):
        first.step(score)
    second.load(first.state())
    for _ in range(3):
        second.step(score)
    assert second.state() == whole.state()


def test_one_gene_is_enough() -> None:
    evolution = Evolution(Genes(BYTES[:1], 60, "optembed"), seed=0)
    for _ in range(3):
        evolution.step(lambda candidate: candidate[0])
    assert evolution.best()[0] == (3,)


def test_a_budget_below_width_one_is_infeasible() -> None:
    with pytest.raises(et.InfeasibleBudget, match="'optembed' cannot fit into") as caught:
        Genes(BYTES, 5739, "optembed")
    assert caught.value.min_bytes == 4 * ROWS.sum() == 5740
