"""Results of measurements: as a table, as CSV, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from embtab.bench.timing import Times
from embtab.bench.workload import Case
from embtab.errors import UserError
from embtab.files import write_text
from embtab.plotting import pyplot, save_figure
from embtab.text import csv_text


@dataclass(frozen=True)
class Result:
    """One arm of one case.

    Args:
        what: "lookups", "autoint", "din", "loader" or "serving".
        phase: "forward", or "step" for all of it.
        arm: the method or the peer.
        dim: D.
        batch: rows.
        bag: ids in a bag, or events in a history.
        skew: of the ids.
        ids: of all features together.
        median_ms: of the rounds.
        p99_ms: their 99th percentile.
        ratio: median of the rounds' ratios to the baseline; above 1 is slower.
        rate: a second: lookups, or rows (samples) where a ranker or a reader is measured.
        row_fraction: lookups as a fraction of the measured rate of random rows; above 1 where caches hold the rows.
        sample_bytes: of the rows that one sample reads, without what the optimizer writes.
        peak_bytes: of a process that does this alone, where asked for.
    """

    what: str
    phase: str
    arm: str
    dim: int
    batch: int
    bag: int
    skew: str
    ids: int
    median_ms: float
    p99_ms: float
    ratio: float
    rate: float
    row_fraction: float | None = None
    sample_bytes: int | None = None
    peak_bytes: int | None = None


def result(what: str, phase: str, arm: str, case: Case, times: Times, units: int) -> Result:
    """A result from times; `units` is what one turn does."""
    return Result(
        what=what,
        phase=phase,
        arm=arm,
        dim=case.dim,
        batch=case.batch,
        bag=case.bag,
        skew=case.skew,
        ids=case.num_ids,
        median_ms=1e3 * times.median,
        p99_ms=1e3 * times.tail,
        ratio=times.ratio,
        rate=units / times.median,
    )


def as_text(results: Sequence[Result]) -> str:
    """A line per result, aligned."""
    head = ["what", "phase", "arm", "dim", "batch", "bag", "skew", "ids", "ms", "p99", "ratio", "M/s", "of rows"]
    head += ["B/sample", "peak MB"]
    lines = [head]
    for r in results:
        optional = [_number(r.row_fraction, 1, ".2f"), _number(r.sample_bytes, 1, ".0f")]
        optional += [_number(r.peak_bytes, 1e-6, ".0f")]
        where = [r.what, r.phase, r.arm, str(r.dim), str(r.batch), str(r.bag), r.skew, f"{r.ids:,}"]
        numbers = [f"{r.median_ms:.3f}", f"{r.p99_ms:.3f}", f"{r.ratio:.2f}", f"{r.rate / 1e6:.3f}"]
        lines.append([*where, *numbers, *optional])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (0, 1, 2, 6)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Every result with all digits."""
    write_text(path, csv_text([field.name for field in fields(Result)], map(asdict, results), "\n"))


def plot(results: Sequence[Result], path: Path) -> None:
    """The cost of a lookup (ns, forward + backward + update) against table size and against batch size.

    Raises:
        UserError: where matplotlib is not installed, or no lookups were measured.
    """
    steps = [r for r in results if r.what == "lookups" and r.phase == "step"]
    if not steps:
        raise UserError("a plot shows lookups; measure them too")
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    first = steps[0]
    for panel, (axis, label, fixed) in zip(
        axes, [("ids", "ids of all features", "batch"), ("batch", "rows of a batch", "ids")], strict=True
    ):
        same = ("dim", "bag", "skew", fixed)
        shown = [r for r in steps if all(getattr(r, name) == getattr(first, name) for name in same)]
        for arm in dict.fromkeys(r.arm for r in shown):
            line = sorted((getattr(r, axis), 1e9 / r.rate) for r in shown if r.arm == arm)
            panel.plot(*zip(*line, strict=True), marker="o", label=arm)
        panel.set(xscale="log", yscale="log", xlabel=label)
        about = f"dim {first.dim}, bags of {first.bag}, {first.skew}, {fixed} {getattr(first, fixed):,}"
        panel.set_title(about, fontsize="small")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("ns a lookup: forward + backward + update")
    axes[1].legend()
    save_figure(figure, path)
