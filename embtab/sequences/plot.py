"""A study's AUC against bytes, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embtab.compare.statistics import mean_interval
from embtab.plotting import pyplot, save_figure

Row = dict[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: a panel per method, a line per arm through its budgets; bars are the intervals over seeds.

    Args:
        rows: of a study, as `embtab.sequences.run` writes them.
        path: of the picture.

    Raises:
        UserError: where matplotlib is not installed.
    """
    found = points(rows)
    methods = list(dict.fromkeys(method for method, _ in found))
    figure, panels = pyplot().subplots(
        1, len(methods), figsize=(3 + 3.2 * len(methods), 4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, method in zip(panels[0], methods, strict=True):
        for (own, arm), line in found.items():
            if own == method:
                nbytes, means, bars = zip(*line, strict=True)
                panel.errorbar(nbytes, means, yerr=bars, marker="o", capsize=3, label=arm)
        panel.set(xscale="log", xlabel="bytes of all tables", title=method)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("AUC")
    panels[0][-1].legend(fontsize="small")
    save_figure(figure, path)


def points(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """By method and arm: bytes, mean AUC and half its interval (0 for a single seed), in ascending order of bytes."""
    groups: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault((row["method"], row["arm"]), {}).setdefault(row["nbytes"], []).append(row["auc"])
    found = {}
    for key, by_bytes in groups.items():
        intervals = [(nbytes, mean_interval(values)) for nbytes, values in sorted(by_bytes.items())]
        found[key] = [(nbytes, each.mean, (each.high or each.mean) - each.mean) for nbytes, each in intervals]
    return found
