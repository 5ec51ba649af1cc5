"""Lookups beside the plainest compiled loop that reads the same rows, with the caches emptied before every call.

    python benchmarks/beside_gather.py [--dim 16] [--scale 1] [--skew zipf] [--rounds 31]

Tables are those of Criteo's 26 features, batches 4096 samples of one id each. The loop is given rows, reads them table
after table and writes them one after the other; it is tried with rows asked for 0, 16 and 32 ahead, with vectors kept
in the caches and written past them. A lookup is given rows as well and writes [B, F, D]; `from ids` is the whole way
from a KeyedJaggedTensor. Arms take turns; ratios are of medians, to the loop's best with each kind of writing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch

import embtab as et
from embtab.bench.workload import Case
from embtab.compiler import build

BATCHES = 10


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dim", type=int, default=16)
    options.add_argument("--scale", type=float, default=1.0, help="times Criteo's cardinalities")
    options.add_argument("--skew", default="zipf", choices=["zipf", "uniform"])
    options.add_argument("--rounds", type=int, default=31)
    asked = options.parse_args()
    torch.set_num_threads(1)
    case = Case(dim=asked.dim, cap=None, scale=asked.scale, skew=asked.skew)
    batches = case.batches(BATCHES, torch.device("cpu"))
    plan = et.plan(case.features, "dense", dim=asked.dim)
    arms: dict[str, Callable[[int], object]] = {}
    for backend in ("native", "fbgemm"):
        tables = et.EmbeddingBagCollection(plan, backend)
        requests = [tables.asked(batch).requests for batch in batches]
        arms[f"{backend}, from rows"] = lambda i, tables=tables, requests=requests: tables.lookup(requests[i])
        arms[f"{backend}, from ids"] = lambda i, tables=tables: tables(batches[i])
        if backend == "native":
            arms |= loops(tables, batches, case)
    nothing = torch.ones(16 << 20)  # 64 MB: more than the caches hold
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(asked.rounds):
        for place, (name, arm) in enumerate(arms.items()):
            nothing.add_(1)
            begun = time.perf_counter()
            arm((turn * len(arms) + place) % BATCHES)
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: median(times[3:]) for name, times in seconds.items()}
    best = {kind: min(v for name, v in medians.items() if name.endswith(kind)) for kind in ("kept", "past")}
    print(f"{asked.skew}, dim {asked.dim}, {sum(case.cardinalities):,} rows")
    print(f"{'':22}{'ms':>8}{'of the loop':>13}{'of the loop, past the caches':>30}")
    for name, value in medians.items():
        print(f"{name:22}{value * 1e3:8.2f}{best['kept'] / value:13.2f}{best['past'] / value:30.2f}")


def loops(tables: et.EmbeddingBagCollection, batches: list, case: Case) -> dict[str, Callable[[int], object]]:
    """The loop on the same memory, each way."""
    function = build(Path(__file__).with_name("gather.cpp"), "the comparison").gather
    firsts = torch.tensor([0, *accumulate(case.cardinalities)][:-1]).repeat_interleave(case.batch)
    rows = [batch.values() + firsts for batch in batches]
    table, out = tables.lookup.stack(case.dim), torch.zeros(len(firsts), case.dim)

    def loop(i: int, ahead: int, past: bool) -> None:
        pointers = [tensor.data_ptr() for tensor in (out, table, rows[i])]
        function(*map(c_void_p, pointers), *map(c_int64, (len(firsts), case.dim, ahead, past)))

    return {
        f"loop, {ahead} ahead, {kind}": lambda i, ahead=ahead, kind=kind: loop(i, ahead, kind == "past")
        for ahead in (0, 16, 32)
        for kind in ("kept", "past")
    }


if __name__ == "__main__":
    main()
