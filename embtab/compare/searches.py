"""What searching tables cost: paid once, in training; their bytes are those that serving pays for, all the time."""

from __future__ import annotations

import statistics

from embtab.compare.figure import Figure, Table, name_of, number
from embtab.compare.summary import Point, Summary
from embtab.sizes import format_bytes


def search_cost(summary: Summary) -> Figure | None:
    """Seconds, samples and memory of searches, with the dense training as their unit; None where nothing searched."""
    searched = [point for point in summary.points if point.by_seed("search_seconds")]
    if not searched:
        return None
    dense = summary.dense()
    shown = searched if dense is None else [dense, *searched]
    columns = ("method", "rows", "budget", "search, s", "all training, s", "in dense trainings")
    lines = tuple(
        (
            *name_of(point),
            number(point.mean("search_seconds"), ".1f"),
            number(point.mean("seconds"), ".1f"),
            number(None if dense is None else in_dense_trainings(point, dense), ".2f"),
            _size(point.mean("training_nbytes")),
            format_bytes(point.nbytes),
        )
        for point in shown
    )
    text = (
        "Mean over seeds. Search: all before the last training. In dense trainings: the samples that all stages "
        "trained on, retraining included, over those of the dense training of the same seed. Training bytes: tables, "
        "their optimizer's memory and masks, the most of any stage, which serving does not need. Seconds are those of "
        "the machine as it was."
    )
    table = Table((*columns, "training bytes", "serving bytes"), lines)
    return Figure("search", "What the search cost", text, (), table)


def in_dense_trainings(point: Point, dense: Point) -> float | None:
    """Trained samples as a multiple of the dense training's, paired by seed; None where no seed has both."""
    unit = dense.by_seed("trained_samples")
    ratios = [samples / unit[seed] for seed, samples in point.by_seed("trained_samples").items() if seed in unit]
    return statistics.fmean(ratios) if ratios else None


def _size(nbytes: float | None) -> str:
    return "" if nbytes is None else format_bytes(round(nbytes))
