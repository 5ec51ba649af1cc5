"""What is compared: methods x budgets x seeds on one dataset with one ranker, read from a YAML file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embtab.errors import UserError
from embtab.methods import METHODS
from embtab.planning import Plan
from embtab.planning.specs import MethodSpec, by_feature, label, named
from embtab.training.setup import TrainingSetup
from embtab.yaml_files import read_yaml


@dataclass(frozen=True)
class Sweep(TrainingSetup):
    """The settings of a comparison; every field may stand in the YAML file."""

    methods: tuple[MethodSpec, ...]
    """Names of methods, or maps such as {name: qr, op: sum}; of `embtab.METHODS`, or of `embtab.learned.LEARNED`, which
    search their shape. `dense` is run once a seed, without a budget."""
    budgets: tuple[int | str, ...]
    """Serving bytes: 8_000_000, "8MB", or "0.1x" of the dense tables."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds hashes, initial weights and the shuffle; every method gets the same ones."""
    precisions: tuple[str, ...] = ("fp32",)
    """Of the served rows: fp32, fp16, int8, int4. Training is in fp32; results are those of the served rows."""

    def each_model(self) -> list[Sweep]:
        """The sweep of every ranker."""
        models = [self.model] if isinstance(self.model, Mapping) else self.model
        return [dataclasses.replace(self, model=model) for model in models]

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that a sweep stopped early still compares all methods.

        `auto` chooses its precision itself, and so does a method that names one. Dense tables are always measured in
        int8, too: it takes no further training, and is what to surpass.
        """
        cells = []
        for seed in self.seeds:
            for precision in self.precisions:
                for method in self.methods:
                    budgets = (None,) if label(method) == "dense" else self.budgets
                    if not _chooses_precision(method):
                        cells += [Cell(method, budget, precision, seed) for budget in budgets]
            for method in filter(_chooses_precision, self.methods):
                cells += [Cell(method, budget, None, seed) for budget in self.budgets]
            if "dense" in map(label, self.methods) and "int8" not in self.precisions:
                cells.append(Cell("dense", None, "int8", seed))
        return cells


@dataclass(frozen=True)
class Cell:
    """One run: a method at a budget (None: no limit) with a seed."""

    method: MethodSpec
    budget: int | str | None
    precision: str | None
    seed: int

    @property
    def name(self) -> str:
        """For people: "qr op=sum, 0.1x, fp32, seed 2"."""
        return (
            f"{label(self.method)}, {self.budget or 'no budget'}, {self.precision or 'any precision'}, seed {self.seed}"
        )


def _chooses_precision(method: MethodSpec) -> bool:
    """Whether the precision is the method's to say: of `auto`, and where its options name one."""
    chosen_by = by_feature(method)
    if chosen_by is not None:
        return any("precision" in named(each)[1] for each in chosen_by.values())
    name, options = named(method)
    return name == "auto" or (name in METHODS and "precision" in options)


def cell_key(sweep: Sweep, plan: Plan, fingerprint: str, seed: int) -> str:
    """16 hex digits of all that determines a run's result: two cells with one key are the same run."""
    described = plan.to_dict()
    described.pop("budget")
    text = json.dumps([fingerprint, described, sweep.training, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_key(sweep: Sweep, plan: Plan, seed: int) -> str:
    """Equal for runs that train alike: rows are rounded to their precision after training only."""
    described = plan.to_dict()
    described.pop("budget")
    for table in described["tables"]:
        table.pop("precision")
    return json.dumps([described, sweep.training, seed], sort_keys=True)


def read_sweep(file: str | Path, **overrides: Any) -> Sweep:
    """The sweep of a YAML file; `overrides` that are not None replace its settings.

    Raises:
        UserError: when the file cannot be read, has an unknown key or a value of the wrong kind.
    """
    loaded = read_yaml(file)
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected keys such as data, methods and budgets")
    loaded |= {key: value for key, value in overrides.items() if value is not None}
    known = {each.name: each for each in dataclasses.fields(Sweep)}
    for key, value in loaded.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {key!r}; there are {', '.join(known)}")
        loaded[key] = _checked(str(file), key, value)
    for key in ("data", "methods", "budgets"):
        if key not in loaded:
            raise UserError(f"{file}: key {key!r} is missing")
    return Sweep(**loaded)


_KINDS: dict[str, type] = {
    "data": str,
    "dim": int,
    "model": dict,
    "epochs": int,
    "patience": int,
    "batch_size": int,
    "lr": float,
    "weight_decay": float,
    "table_optimizer": str,
    "table_lr": float,
    "init_std": float,
}


def _checked(file: str, key: str, value: Any) -> Any:
    """The value in the type of its field."""
    if key in ("methods", "budgets", "seeds", "precisions"):
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"{file}: {key} must be a list with at least one entry, got {value!r}")
        if key == "seeds" and not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value):
            raise UserError(f"{file}: seeds must be whole numbers, got {value!r}")
        return tuple(value)
    if key == "model" and isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return tuple(value)
    kind = _KINDS[key]
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{file}: {key} must be {kind.__name__}, got {value!r}")
    if isinstance(value, int) and value < 1:
        raise UserError(f"{file}: {key} must be at least 1, got {value!r}")
    return value
