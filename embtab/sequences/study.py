"""What is compared of sequence models: arms x methods x budgets x seeds on one dataset, read from a YAML file."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from embtab.errors import UserError
from embtab.models import DARE, SEQUENCE_MODELS
from embtab.planning.specs import MethodSpec, label
from embtab.yaml_files import read_yaml

TASK = "sequences"
"""The `task` that a configuration of this kind names."""
_ATTENTION = ("dim", "share", "method", "precision", "init_std")
_OWN = ("model", "dim", "attention")


@dataclass(frozen=True)
class Arm:
    """A model and its tables.

    Attributes:
        name: for people.
        model: a name of SEQUENCE_MODELS: MeanPool, DIN or DARE (without `attention` TWIN-style: one table for both).
        dim: width of the representation.
        attention: settings of tables of their own for the attention, or None: `dim`; `share` of the budget; `method`,
            `precision` and `init_std` where they differ from the representation's.
        options: of the model.
    """

    name: str
    model: str
    dim: int
    attention: Mapping[str, Any] | None
    options: Mapping[str, Any]

    def made(self) -> partial[nn.Module]:
        """The model, but for what the data says."""
        return partial(_classes()[self.model], **self.options)


@dataclass(frozen=True)
class Cell:
    """One run: an arm with tables of a method at a budget (None: no limit), with a seed."""

    arm: Arm
    method: MethodSpec
    budget: int | str | None
    seed: int

    @property
    def name(self) -> str:
        """For people: "twin, qr op=sum, 0.1x, seed 2"."""
        return f"{self.arm.name}, {label(self.method)}, {self.budget or 'no budget'}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """The settings of a comparison; every field may stand in the YAML file, beside `task: sequences`."""

    data: str
    """A folder made by `embtab prepare sequences`."""
    arms: tuple[Arm, ...]
    """By name: `model`, options of the model, and `dim` or `attention` where they differ; see `Arm`."""
    methods: tuple[MethodSpec, ...] = ("dense",)
    """Names of methods, or maps such as {name: qr, op: sum}. `dense` is run once a seed, without a budget."""
    budgets: tuple[int | str, ...] = ()
    """Serving bytes of both tables together: 8_000_000, "8MB", or "0.1x" of dense tables of width `dim`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds hashes, initial weights and the shuffle; every arm gets the same ones."""
    reference: str = ""
    """The arm that differences are taken to; the first one if empty."""
    dim: int = 16
    head: Mapping[str, Any] = field(default_factory=dict)
    """Options of every model, such as {hidden: [64, 32], dropout: 0.2}."""
    leave_out: tuple[str, ...] = ()
    """Features that are not used, such as the user."""
    epochs: int = 10
    """At most; training stops after `patience` epochs without a better AUC on the validation split."""
    patience: int = 1
    batch_size: int = 1000
    lr: float = 1e-3
    """Adam's learning rate for the model."""
    weight_decay: float = 0.0
    table_optimizer: str = "rowwise_adagrad"
    table_lr: float = 0.05
    init_std: float = 0.1
    """Standard deviation of the entries of every fresh vector."""
    l2: float = 0.0
    """Strength of the mini-batch aware regularisation of the tables."""

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that a study stopped early still compares all arms."""
        for seed in self.seeds:
            for method in self.methods:
                for budget in (None,) if label(method) == "dense" else self.budgets:
                    yield from (Cell(arm, method, budget, seed) for arm in self.arms)

    def key(self, cell: Cell, fingerprint: str) -> str:
        """16 hex digits of all that determines a run's result; an arm's name does not."""
        arm = dataclasses.asdict(cell.arm) | {"name": ""}
        names = ("dim", "leave_out", "epochs", "patience", "batch_size", "lr", "weight_decay", "table_optimizer")
        training = [getattr(self, name) for name in (*names, "table_lr", "init_std", "l2")]
        text = json.dumps([fingerprint, arm, cell.method, cell.budget, cell.seed, training], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_study(file: Path) -> bool:
    """Whether a configuration file says `task: sequences`; False for one that cannot be read."""
    try:
        loaded = read_yaml(file)
    except UserError:
        return False
    return isinstance(loaded, dict) and loaded.get("task") == TASK


def read_study(file: Path, **overrides: Any) -> Study:
    """The study of a YAML file; `overrides` that are not None replace its settings.

    Raises:
        UserError: when the file cannot be read, has an unknown key or a value of the wrong kind.
    """
    loaded = read_yaml(file)
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected keys such as data and arms")
    loaded |= {key: value for key, value in overrides.items() if value is not None}
    loaded.pop("task", None)
    known = {each.name: each for each in dataclasses.fields(Study)}
    for key, value in loaded.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {key!r}; there are {', '.join(known)}")
        loaded[key] = _checked(f"{file}: {key}", known[key].type, value)
    for key in ("data", "arms"):
        if not loaded.get(key):
            raise UserError(f"{file}: key {key!r} is missing")
    arms = {name: _arm(f"{file}: arm {name!r}", name, given, loaded) for name, given in loaded["arms"].items()}
    if loaded.get("reference", "") not in ("", *arms):
        raise UserError(f"{file}: reference {loaded['reference']!r} is no arm; there are {', '.join(arms)}")
    return Study(**loaded | {"arms": tuple(arms.values())})


def _arm(where: str, name: str, given: Any, loaded: Mapping[str, Any]) -> Arm:
    if not isinstance(given, Mapping) or given.get("model") not in _classes():
        raise UserError(f"{where}: needs a model of {', '.join(_classes())}")
    options = {**loaded.get("head", {}), **{key: value for key, value in given.items() if key not in _OWN}}
    known = list(inspect.signature(_classes()[given["model"]]).parameters)[4:]
    attention: Mapping[str, Any] | None = given.get("attention")
    for option in options:
        if option not in known:
            raise UserError(f"{where}: {given['model']} has no option {option!r}; it has {', '.join(known)}")
    for key in attention or ():
        if key not in _ATTENTION:
            raise UserError(f"{where}: attention has no setting {key!r}; it has {', '.join(_ATTENTION)}")
    if attention is not None and given["model"] != DARE.__name__:
        raise UserError(f"{where}: {given['model']} has no use for attention tables of its own; DARE has")
    if attention is not None and not 0 < attention.get("share", 0.5) < 1:
        raise UserError(f"{where}: the attention's share of the budget must lie in (0, 1), got {attention['share']}")
    return Arm(name, given["model"], given.get("dim", loaded.get("dim", 16)), attention, options)


def _classes() -> dict[str, type[nn.Module]]:
    return {each.__name__: each for each in SEQUENCE_MODELS}


def _checked(where: str, kind: Any, value: Any) -> Any:
    """The value in the type of its field, which is written as text."""
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(value)
    if where.endswith("arms") and isinstance(value, Mapping):
        return value
    if kind == "float" and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    wanted = {"str": str, "int": int, "float": float}.get(kind, Mapping)
    if kind.startswith("tuple") or not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{where} must be {'a list' if kind.startswith('tuple') else kind}, got {value!r}")
    if isinstance(value, int) and value < 1:
        raise UserError(f"{where} must be at least 1, got {value!r}")
    return value
