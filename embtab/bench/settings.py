"""What `embtab bench` measures, and of what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from embtab.bench.lookups import TORCHREC
from embtab.bench.workload import Case

WHAT = ("lookups", "autoint", "din", "loader", "serving", "search")


@dataclass(frozen=True)
class Settings:
    """What to measure; every combination of the lists is a case.

    Args:
        what: of WHAT.
        arms: tables under test, as `make_tables` takes them.
        baseline: of the ratios; where it cannot do what is measured, the first arm that can.
        budget: of methods that compress.
        optimizer: of tables.
        dims: D.
        batches: rows.
        bags: ids in a bag, or events in a history.
        skews: "zipf", "uniform".
        cap: of cardinalities.
        scales: of cardinalities.
        rounds: kept of each case.
        fill: of DIN's histories.
        data: a dataset folder for the loader; one is generated if None.
        cold: time requests that come after those of other arms, instead of an arm's own.
        memory: also measure peak memory, each arm in a process of its own.
        device: where.
        machine_bytes: of the arrays that the machine's limits are measured with.
    """

    what: Sequence[str] = ("lookups",)
    arms: Sequence[str] = (TORCHREC, "dense", "hash", "unified", "qr")
    baseline: str = TORCHREC
    budget: str = "0.1x"
    optimizer: str = "rowwise_adagrad"
    dims: Sequence[int] = (16,)
    batches: Sequence[int] = (4096,)
    bags: Sequence[int] = (1,)
    skews: Sequence[str] = ("zipf",)
    cap: int | None = 100_000
    scales: Sequence[float] = (1.0,)
    rounds: int = 15
    fill: float = 1.0
    data: Path | None = None
    cold: bool = False
    memory: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine_bytes: int = 512 << 20

    def cases(self) -> Iterator[Case]:
        """Every combination."""
        for scale, skew, bag, batch, dim in product(self.scales, self.skews, self.bags, self.batches, self.dims):
            yield Case(dim, batch, bag, skew, self.cap, scale)
