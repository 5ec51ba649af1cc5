"""Evolution of one whole number per gene, within a byte budget.

The search of OptEmbed's second stage (Guo et al., "Single Path One-Shot Neural Architecture Search", ECCV 2020, arXiv
1904.00420): keep the best, mutate, cross over. A candidate is never evaluated above the budget: it is repaired before.

The published code (fuyuanlyu/OptEmbed) is righted in this: a mutated or crossed candidate is a new tuple, never its
parent changed; genes are drawn from their whole range in mutation as at the start; the crossover point lies between two
genes; the best found so far are always among the parents, so the best fitness never falls; and there is a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embtab.methods.solver import infeasible

Candidate = tuple[int, ...]
Fitness = Callable[[Candidate], float]


@dataclass(frozen=True)
class Genes:
    """The search space.

    Args:
        nbytes: int64 [S, most + 1]: serving bytes of gene s at each value; a larger value never takes fewer. Values
            below 1 are not used.
        budget: of all genes together.
        method: for the error message.

    Raises:
        InfeasibleBudget: when all genes at 1 take more than the budget.
    """

    nbytes: np.ndarray
    budget: int
    method: str

    def __post_init__(self) -> None:
        smallest = self.size((1,) * len(self.nbytes))
        if smallest > self.budget:
            raise infeasible(self.method, self.budget, smallest)

    @property
    def most(self) -> int:
        """The largest value of a gene."""
        return self.nbytes.shape[1] - 1

    def size(self, candidate: Sequence[int] | np.ndarray) -> int:
        """Serving bytes of a candidate."""
        return int(self.nbytes[np.arange(len(candidate)), list(candidate)].sum())

    def drawn(self, random: np.random.Generator) -> Candidate:
        """Any values, repaired."""
        return self.repaired(random.integers(1, self.most + 1, len(self.nbytes)).tolist(), random)

    def mutated(self, parent: Candidate, chance: float, random: np.random.Generator) -> Candidate:
        """Each gene drawn anew with a chance, repaired."""
        fresh = random.integers(1, self.most + 1, len(parent)).tolist()
        changed = random.random(len(parent)) < chance
        return self.repaired([f if c else p for p, f, c in zip(parent, fresh, changed, strict=True)], random)

    def crossed(self, one: Candidate, other: Candidate, random: np.random.Generator) -> Candidate:
        """The first genes of one, the rest of the other, repaired; at least one gene of each where there are two."""
        point = int(random.integers(1, len(one))) if len(one) > 1 else 1
        return self.repaired([*one[:point], *other[point:]], random)

    def repaired(self, candidate: Sequence[int], random: np.random.Generator) -> Candidate:
        """Within the budget: genes drawn in proportion to what it saves give up one after the other."""
        values = np.array(candidate)
        genes = np.arange(len(values))
        while self.size(values) > self.budget:
            saved = self.nbytes[genes, values] - self.nbytes[genes, np.maximum(values - 1, 1)]
            if not saved.any():  # values that cost the same: step below them
                saved = (values > 1).astype(np.int64)
            values[random.choice(genes, p=saved / saved.sum())] -= 1
        return tuple(int(value) for value in values)


@dataclass
class Evolution:
    """Where an evolution stands; plain types, so that it can be written down between generations.

    Args:
        genes: the search space.
        seed: of every draw; a generation depends on the seed, its number and the fitness of all before, alone.
        parents: how many of the best candidates have children.
        mutations: children by mutation, each generation.
        crossovers: children by crossover.
        chance: of a gene to mutate.
    """

    genes: Genes
    seed: int
    parents: int = 15
    mutations: int = 10
    crossovers: int = 10
    chance: float = 0.1
    generation: int = 0
    fitness: dict[Candidate, float] = field(default_factory=dict)
    born: dict[Candidate, int] = field(default_factory=dict)

    def best(self) -> list[Candidate]:
        """The fittest candidates of all generations, the best first; among equals the smallest, then the first."""
        return sorted(self.fitness, key=lambda c: (-self.fitness[c], self.genes.size(c)))[: self.parents]

    def step(self, evaluate: Fitness) -> None:
        """One generation: candidates are born, and those never seen before evaluated."""
        random = np.random.default_rng([self.seed, self.generation])
        parents = self.best()
        if not parents:
            children = [self.genes.drawn(random) for _ in range(self.mutations + self.crossovers)]
        else:
            chosen = [parents[i] for i in random.integers(0, len(parents), self.mutations)]
            children = [self.genes.mutated(parent, self.chance, random) for parent in chosen]
            pairs = random.integers(0, len(parents), (self.crossovers, 2))
            children += [self.genes.crossed(parents[i], parents[j], random) for i, j in pairs]
        for child in dict.fromkeys(children):
            if child not in self.fitness:
                self.fitness[child], self.born[child] = evaluate(child), self.generation
        self.generation += 1

    def state(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "generation": self.generation,
            "candidates": [[list(c), fitness, self.born[c]] for c, fitness in self.fitness.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.generation = state["generation"]
        self.fitness = {tuple(genes): fitness for genes, fitness, _ in state["candidates"]}
        self.born = {tuple(genes): born for genes, _, born in state["candidates"]}
