"""What a search of long histories costs (DARE's first stage): attention vectors looked up, scored, and the best found.

The arms are widths of the attention's vectors: the narrower, the fewer bytes are read and multiplied. One field, one
history a row, all histories of one length; no gradients, as in serving and in training's own search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.bench.report import Result, result
from embtab.bench.settings import Settings
from embtab.bench.timing import Arm, Stopwatch, Times, alternate
from embtab.bench.workload import Case, draw
from embtab.errors import UserError
from embtab.features import Feature
from embtab.models.dare import DARE
from embtab.models.events import Events, top_events
from embtab.planning import plan
from embtab.plotting import pyplot, save_figure
from embtab.tables import EmbeddingCollection

ITEMS = 200_000
TOP_K = 20
PHASES = ("lookup", "score", "top-k")
FEATURES = [Feature("item", ITEMS, id_space="items"), Feature("events", ITEMS, pooling="none", id_space="items")]


def search_results(settings: Settings) -> Iterator[Result]:
    """The cost of each phase, and of all ("search"), for every width, length and batch; ratios are to the first width.

    Raises:
        UserError: when an arm's vectors would not fit into memory comfortably.
    """
    for skew, length, batch in product(settings.skews, settings.bags, settings.batches):
        needed = 3 * batch * length * max(settings.dims) * 4
        if needed > 4 << 30:
            raise UserError(
                f"search: {batch} histories of {length} events of width {max(settings.dims)} need "
                f"{needed / 1e9:.0f} GB of vectors; give a smaller --batch"
            )
        cases = {dim: Case(dim, batch, length, skew) for dim in settings.dims}
        arms = {f"{dim}": search_arm(case, settings.device) for dim, case in cases.items()}
        seconds = alternate(arms, settings.rounds, settings.device, title=f"search {length}")
        baseline = seconds[f"{settings.dims[0]}"]
        for dim, case in cases.items():
            own = seconds[f"{dim}"]
            for i, phase in enumerate(PHASES):
                yield _result(phase, case, Times(own[:, i], baseline[:, i]))
            yield _result("search", case, Times(own.sum(1), baseline.sum(1)))


def search_arm(case: Case, device: torch.device) -> Arm:
    """Searches a batch of `case.batch` histories of `case.bag` events each, in three phases."""
    batches = [_histories(case, seed, device) for seed in range(4)]
    tables = EmbeddingCollection(plan(FEATURES, dim=case.dim), "torch", init_std=1.0).to(device).eval()
    model = DARE(0, 0, 1, case.dim, top_k=TOP_K, has_position=False).to(device)

    @torch.inference_mode()
    def turn(i: int, watch: Stopwatch) -> None:
        vectors = tables(batches[i % len(batches)])
        target, history = vectors["item"].values(), vectors["events"]
        events = Events(target.unsqueeze(1), history.values().unsqueeze(1), history.lengths().long())
        watch.lap()
        scores = model.scores(events)
        watch.lap()
        top_events(scores, events.lengths, TOP_K)
        watch.lap()

    return turn


def _histories(case: Case, seed: int, device: torch.device) -> KeyedJaggedTensor:
    rng = np.random.default_rng(seed)
    values = np.concatenate([draw(rng, ITEMS, size, case.skew) for size in (case.batch, case.batch * case.bag)])
    lengths = torch.tensor([1, case.bag]).repeat_interleave(case.batch)
    return KeyedJaggedTensor(["item", "events"], torch.from_numpy(values), lengths=lengths).to(device)


def _result(phase: str, case: Case, times: Times) -> Result:
    """With the ids of the item table, not of Criteo's."""
    found = result("search", phase, "dense", case, times, case.batch * case.bag)
    return replace(found, ids=ITEMS, sample_bytes=(case.bag + 1) * case.dim * 4)


def plot_search(results: Sequence[Result], path: Path) -> None:
    """Milliseconds a history against its length, and against the width as a share of the first width's.

    Raises:
        UserError: where matplotlib is not installed.
    """
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter

    totals = [r for r in results if r.what == "search" and r.phase == "search"]
    first = totals[0]
    totals = [r for r in totals if (r.batch, r.skew) == (first.batch, first.skew)]
    figure, (by_length, by_dim) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for dim in dict.fromkeys(r.dim for r in totals):
        line = sorted((r.bag, r.median_ms / r.batch) for r in totals if r.dim == dim)
        by_length.plot(*zip(*line, strict=True), marker="o", label=f"width {dim}")
    by_length.set(xscale="log", yscale="log", xlabel="events of a history", ylabel="ms a history")
    by_length.set_title(f"search: look up, score, best {TOP_K}; batch {first.batch}", fontsize="small")
    for length in dict.fromkeys(r.bag for r in totals):
        line = sorted((r.dim, r.ratio) for r in totals if r.bag == length)
        by_dim.plot(*zip(*line, strict=True), marker="o", label=f"{length:,} events")
    widths = sorted({r.dim for r in totals})
    by_dim.plot(widths, [dim / first.dim for dim in widths], "k--", label="in proportion")
    by_dim.set(xlabel="width of the attention", ylabel=f"time as a share of width {first.dim}", ylim=(0, None))
    by_length.set_xticks(sorted({r.bag for r in totals}))
    by_length.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_dim.set_xticks(widths)
    for axis in (by_length.xaxis, by_length.yaxis):
        axis.set_major_formatter("{x:,g}")  # plain numbers, not powers of ten
        axis.set_minor_formatter(NullFormatter())
    for panel in (by_length, by_dim):
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, path)
