"""What `embtab bench` does: cases, arms, and results."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from embtab.bench import machine
from embtab.bench.loading import PYARROW, loader_arms, read_once
from embtab.bench.lookups import DENSE_ARMS, TORCH, TORCHREC, lookup_arms
from embtab.bench.memory import free_memory, peak_bytes
from embtab.bench.report import Result, result
from embtab.bench.search import search_results
from embtab.bench.serving import serving_arms
from embtab.bench.settings import WHAT, Settings
from embtab.bench.steps import autoint_arms, din_arms
from embtab.bench.timing import Arm, Times, alternate
from embtab.bench.workload import Case
from embtab.datasets import synthetic
from embtab.errors import UserError

GENERATED_ROWS = 400_000


def run(settings: Settings) -> list[Result]:
    """Measures the machine, then every case of every kind.

    Raises:
        UserError: for a kind that does not exist, or a baseline that is no arm.
    """
    unknown = set(settings.what) - set(WHAT)
    if unknown:
        raise UserError(f"unknown measurement {min(unknown)!r}; there are {', '.join(WHAT)}")
    if settings.memory and "search" in settings.what:
        raise UserError("memory is not measured of search: leave out one of the two")
    if settings.baseline not in settings.arms:
        raise UserError(f"the baseline {settings.baseline!r} is not measured; arms are {', '.join(settings.arms)}")
    limits = machine.measure(list(settings.dims), settings.device, settings.machine_bytes)
    print(limits, file=sys.stderr)
    results: list[Result] = []
    for what in settings.what:
        if what == "loader":
            results += _loader(settings)
            continue
        if what == "search":
            results += search_results(settings)
            continue
        for case in settings.cases():
            if _fits(what, settings, case):
                results += _measured(what, settings, case, limits)
    return results


def turns(what: str, settings: Settings, case: Case) -> dict[str, Times]:
    """Times of every arm, by "arm" and, for lookups, "arm forward" too; the baseline's among them."""
    make = {"lookups": lookup_arms, "autoint": autoint_arms}
    device = settings.device
    if what == "din":
        names = [name for name in settings.arms if name not in (TORCHREC, TORCH)]
        arms = din_arms(names, case, settings.budget, settings.optimizer, device, settings.fill)
    elif what == "serving":
        arms = serving_arms(settings.arms, case, settings.budget, settings.optimizer, device, settings.cold)
    else:
        arms = make[what](settings.arms, case, settings.budget, settings.optimizer, device)
    rounds = settings.rounds if what != "serving" else max(settings.rounds, min(1000, 40_000 // case.batch))
    seconds = alternate(arms, rounds, device, title=what)
    baseline = settings.baseline if settings.baseline in arms else next(iter(arms))
    found = {name: Times(each.sum(axis=1), seconds[baseline].sum(axis=1)) for name, each in seconds.items()}
    if what == "lookups":
        found |= {f"{name} forward": Times(each[:, 0], seconds[baseline][:, 0]) for name, each in seconds.items()}
    return found


def _measured(what: str, settings: Settings, case: Case, limits: machine.Machine) -> Iterator[Result]:
    units = case.lookups if what == "lookups" else case.batch
    peaks: dict[str, int | None] = {}
    for name, times in turns(what, settings, case).items():
        arm = name.removesuffix(" forward")
        phase = "forward" if name != arm else "request" if what == "serving" else "step"
        found = result(what, phase, arm, case, times, units)
        if what == "lookups":
            per_sample = case.lookups // case.batch * case.dim * 4
            found = replace(found, row_fraction=found.rate / limits.rows[case.dim], sample_bytes=per_sample)
        if settings.memory and arm not in peaks:
            alone = replace(settings, arms=(arm,), baseline=arm, rounds=3, memory=False)
            peaks[arm] = peak_bytes(partial(turns, what, alone, case), settings.device)
        yield replace(found, peak_bytes=peaks.get(arm))


def _fits(what: str, settings: Settings, case: Case) -> bool:
    """Whether the dense tables of all arms fit into three quarters of the free memory; says so where they do not."""
    if what == "din":
        return True
    needed = case.num_ids * case.dim * 4 * sum(name in DENSE_ARMS for name in settings.arms)
    free = torch.cuda.mem_get_info()[0] if settings.device.type == "cuda" else free_memory()
    if needed > 0.75 * free:
        print(f"skipped {case}: its tables need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free", file=sys.stderr)
    return needed <= 0.75 * free


def _loader(settings: Settings) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = settings.data or Path(scratch) / "data"
        if settings.data is None:
            synthetic.prepare(folder, rows=GENERATED_ROWS, scale=0.01, valid=0.01, test=0.01)
        for batch in settings.batches:
            arms: dict[str, Arm]
            arms, rows = loader_arms(folder, batch)
            seconds = alternate(arms, max(settings.rounds // 3, 3), settings.device, title="loader")
            for name, times in seconds.items():
                found = Times(times[:, 0], seconds[PYARROW][:, 0])
                read = partial(read_once, folder, batch, name)
                peak = peak_bytes(read, settings.device) if settings.memory else None
                yield replace(result("loader", "epoch", name, Case(batch=batch), found, rows), peak_bytes=peak)
