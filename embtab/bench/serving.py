"""Requests answered: tables and a small ranker in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embtab.bench.lookups import make_tables
from embtab.bench.timing import Arm, Stopwatch
from embtab.bench.workload import Case, numeric


def serving_arms(names: Sequence[str], case: Case, budget: str, optimizer: str, device: torch.device) -> dict[str, Arm]:
    """Lookup and an MLP of 128-64 units over the vectors and 13 numbers, by each kind of tables.

    Args:
        names: of tables, as `make_tables` takes them.
        case: of one request.
        budget: of methods that compress.
        optimizer: which the tables were trained by.
        device: where requests are answered.
    """
    batches, dense = case.batches(8, device), [x for x, _ in numeric(case, 8, device)]
    torch.manual_seed(0)
    width = 13 + case.dim * len(case.features)
    mlp = nn.Sequential(
        *(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
    ).to(device)

    def arm(name: str) -> Arm:
        tables = make_tables(name, case, budget, optimizer, device)
        tables.module.eval()

        def turn(i: int, watch: Stopwatch) -> None:
            with torch.no_grad():
                mlp(torch.cat([dense[i % 8], tables.forward(batches[i % 8])], dim=1))
            watch.lap()

        return turn

    return {name: arm(name) for name in names}
