"""What a search is asked for: checked before anything is trained, and written into the folder that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embtab.errors import UserError
from embtab.files import write_text
from embtab.learned.forms import largest_within
from embtab.learned.method import Lab, Learned
from embtab.learned.registry import make
from embtab.learned.stages import Stages
from embtab.learned.training import Data
from embtab.methods import Spec
from embtab.planning.specs import MethodSpec
from embtab.sizes import parse_bytes
from embtab.training.setup import TrainingSetup


def settings(
    setup: TrainingSetup, method: MethodSpec, budget: int | float | str, seed: int = 0, precision: str = "fp32"
) -> dict[str, Any]:
    """Everything that decides what `embtab.learned.run` finds for the same arguments, as plain JSON types.

    Raises:
        InfeasibleBudget, UserError: what `run` raises before it trains.
    """
    learned = make(method)
    lab = make_lab(setup, learned.name, budget, seed, precision, Path(), None, learned.check)
    return settings_of(lab, learned.name, options_of(learned))


def make_lab(
    setup: TrainingSetup,
    name: str,
    budget: int | float | str | None,
    seed: int,
    precision: str,
    folder: Path,
    title: str | None,
    check: Callable[[Lab], None] = lambda lab: None,
) -> Lab:
    """Everything that is known before the first stage, checked; nothing is written."""
    spec = Spec(setup.dim, seed, precision)
    data = Data(setup, seed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lab = Lab(setup, data, spec, 0, seed, Stages(folder), title)
    lab.budget = parse_bytes("1x" if budget is None else budget, sum(map(Spec(setup.dim).dense_bytes, lab.spaces)))
    check(lab)
    nothing = {space.name: np.full((space.num_ids, setup.dim), -np.inf) for space in lab.spaces}
    largest_within(lab.spaces, nothing, lab.budget, spec, name)  # which no search can make smaller
    return lab


def options_of(learned: Learned) -> dict[str, Any]:
    """A method's options, with those that were left to their defaults."""
    return dataclasses.asdict(learned)  # type: ignore[call-overload,no-any-return]


def settings_of(lab: Lab, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What decides a search's result, as plain JSON types."""
    decisive = {
        "method": name,
        "options": options,
        "precision": lab.spec.precision,
        "budget": lab.budget,
        "seed": lab.seed,
        "dim": lab.setup.dim,
        "training": lab.setup.training,
        "fingerprint": lab.data.dataset.fingerprint,
    }
    plain: dict[str, Any] = json.loads(json.dumps(decisive))
    return plain


def claim(lab: Lab, decisive: dict[str, Any]) -> None:
    """Writes the settings into the search's folder, or compares them with those that are there.

    Raises:
        UserError: when the folder holds another search.
    """
    folder = lab.stages.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "search.json"
    if not file.exists():
        versions = {name: version(name) for name in ("embtab", "torch", "torchrec", "fbgemm-gpu")}
        write_text(file, json.dumps({**decisive, "versions": versions}, indent=1) + "\n")
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    for name, value in decisive.items():
        if there.get(name) != value:
            raise UserError(
                f"{folder}: holds a search whose {name} was {there.get(name)!r} and is now {value!r}; choose another "
                "folder, or remove this one"
            )
