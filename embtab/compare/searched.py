"""One cell whose tables learn their own shape: searched, trained and measured like the others.

A static method's plan, and so its bytes, are known before it is trained; these methods find theirs. Until then a cell
is known by what decides the result: method, options, budget, precision, seed, settings, and the data's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import embtab.learned
from embtab.compare.sweep import Cell, Sweep
from embtab.compare.train import MeasuredTask, make_trainer, measured, quieten
from embtab.planning.specs import MethodSpec, by_feature, named
from embtab.training.data import DataModule
from embtab.training.progress import Progress


def is_learned(method: MethodSpec) -> bool:
    """Whether a method of a sweep is one of `embtab.learned.LEARNED`."""
    return by_feature(method) is None and named(method)[0] in embtab.learned.LEARNED


def search_key(sweep: Sweep, cell: Cell) -> str:
    """The method and 16 hex digits of all that determines a search's result; also the name of its folder.

    Raises:
        InfeasibleBudget: when no shape of the method fits.
        UserError: for options that make no sense, or data that lacks what the method needs.
    """
    assert cell.budget is not None
    assert cell.precision is not None
    settings = embtab.learned.settings(sweep, cell.method, cell.budget, cell.seed, cell.precision)
    text = json.dumps(settings, sort_keys=True)
    return f"{settings['method']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def search(sweep: Sweep, cell: Cell, folder: Path) -> dict[str, Any]:
    """Searches, and measures what is found as `embtab.compare.train` does.

    Args:
        sweep: the training settings.
        cell: a learned method at a budget.
        folder: of the search's stages and artefacts; a second call goes on from the first.

    Returns:
        What `embtab.compare.train.train` gives, and: nbytes and bytes_by_part of the shape that was found;
        search_seconds, of all before the last training. trained_samples, samples_per_s and seconds are those of all
        stages, training_nbytes the most of any.

    Raises:
        InfeasibleBudget: when only the search could tell that nothing fits.
        UserError: for a loss that is not finite, or a folder with damaged stages.
    """
    quieten()
    assert cell.budget is not None
    assert cell.precision is not None
    found = embtab.learned.run(sweep, cell.method, cell.budget, cell.seed, cell.precision, folder)
    started = time.perf_counter()
    progress = Progress()
    progress.disable()
    task = MeasuredTask(found.tables, found.model)
    row = measured(task, make_trainer(1, [progress]), DataModule(sweep.data, sweep.batch_size, seed=cell.seed))
    return row | {
        "nbytes": found.plan.nbytes,
        "bytes_by_part": found.plan.bytes_by_part(),
        "epochs": found.metrics["epochs"],
        "samples_per_s": found.samples_per_s,
        "search_seconds": found.search_seconds,
        "trained_samples": found.trained_samples,
        "training_nbytes": found.training_nbytes,
        "seconds": found.seconds + time.perf_counter() - started,
    }
