"""Programs that need no embtab: tables or a whole ranker as ONNX or an AOTInductor package, in a folder that vouches
for itself.

    model.onnx, model.onnx.data | model.pt2     the program
    golden.safetensors                          inputs and the outputs they must give
    config.json                                 names, types and shapes of inputs and outputs; sha256 of every file

The golden outputs come from the NumPy reader (and the model in plain torch), not from what is exported. `export` checks
the finished program against them before anything is left at its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from embtab import __version__
from embtab.errors import UserError
from embtab.files import new_folder
from embtab.reader import Bundle, golden
from embtab.reader.manifest import write_signed
from embtab.serving.inputs import ONE_MORE
from embtab.serving.ranker import Ranker
from embtab.serving.tables import ServedTables

FORMAT, VERSION = "embtab-program", 1
ABSOLUTE, RELATIVE = 1e-6, 1e-5
ROWS = 16  # of the golden batch

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
"""Inputs by name -> outputs by name."""


class Kind(Protocol):
    """A form of program: `embtab.serving.onnx`, `embtab.serving.aoti`."""

    FILE: str

    @staticmethod
    def write(module: ServedTables | Ranker, example: Mapping[str, Tensor], path: Path) -> None:
        """Writes the program."""

    @staticmethod
    def load(path: Path) -> Run:
        """The program, ready to run."""


def kind_of(name: str) -> Kind:
    """The form of a name, "onnx" or "aoti".

    Raises:
        UserError: when it is neither, or needs a package that is not installed.
    """
    if name == "onnx":
        from embtab.serving import onnx

        return onnx  # type: ignore[return-value]
    if name == "aoti":
        from embtab.serving import aoti

        return aoti  # type: ignore[return-value]
    raise UserError(f"unknown program {name!r}; there are onnx and aoti")


@torch.no_grad()
def export(
    module: ServedTables | Ranker, bundle: Bundle, path: str | Path, kind: str, about: Mapping[str, Any] | None = None
) -> None:
    """Writes a module as a program, and runs it on the golden inputs before it is let go.

    Args:
        module: tables or a ranker, made from `bundle`.
        bundle: where golden vectors come from.
        path: the folder to make.
        kind: "onnx" or "aoti".
        about: where it comes from; plain JSON types.

    Raises:
        UserError: when `path` holds something, a package is missing, the model cannot be exported, or the program's
            outputs are not those of the model.
    """
    form = kind_of(kind)
    random = np.random.default_rng(0)
    with new_folder(Path(path)) as folder:
        example = made_inputs(module, 3, random)
        given = made_inputs(module, ROWS, random)
        expected = outputs_of(module, bundle, given)
        form.write(module, {name: torch.from_numpy(array) for name, array in example.items()}, folder / form.FILE)
        largest = max(float(np.abs(array).max(initial=0)) for array in expected.values())
        allowed = {"absolute": ABSOLUTE * max(1.0, largest), "relative": RELATIVE}
        run = form.load(folder / form.FILE)
        for some, wanted in [(given, expected), *_of_one_row(module, bundle, given)]:
            worst, fine = compared(run, some, wanted, allowed)
            if not fine:
                raise UserError(f"the exported program differs from the model by {worst:.3g}; nothing was written")
        save_file({**given, **expected}, folder / golden.FILE)
        write_signed(
            folder,
            {
                "format": FORMAT,
                "version": VERSION,
                "producer": f"embtab {__version__}, torch {torch.__version__}",
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "kind": kind,
                "program": form.FILE,
                "inputs": {name: _described(module, name, array) for name, array in given.items()},
                "outputs": {name: _described(module, name, array) for name, array in expected.items()},
                "golden": {"file": golden.FILE, **allowed},
                "provenance": {"bundle": bundle.config.get("sha256"), **(about or {})},
            },
        )


def _of_one_row(module: ServedTables | Ranker, bundle: Bundle, given: Arrays) -> list[tuple[Arrays, Arrays]]:
    """The first row and what it must give, where an input is an array of rows: a program may have a way of its own."""
    first = {name: array[:1] for name, array in given.items()}
    by_row = len({len(array) for array in given.values()}) == 1
    return [(first, outputs_of(module, bundle, first))] if by_row else []


def _described(module: ServedTables | Ranker, name: str, array: np.ndarray) -> dict[str, Any]:
    """Type and shape; lengths that may differ from call to call as words."""
    what, _, feature = name.partition(".")
    tables = module.tables if isinstance(module, Ranker) else module
    if tables.is_stacked:
        named: dict[str, Any] = {"features": tables.names} if name in ("ids", "vectors") else {}
        if name == "ids":
            named["below"] = [_below(module, feature) for feature in tables.names]
        return {"dtype": str(array.dtype), "shape": ["batch", *array.shape[1:]], **named}
    by_name = {each.name: each for each in tables.plan.features}
    if isinstance(module, Ranker) and module.layout and feature in module.layout.histories:
        feature = module.layout.histories[0]  # all fields of a history are equally long
    if what == "offsets":
        return {"dtype": str(array.dtype), "shape": [ONE_MORE]}
    per_id = what in ("ids", "weights") or (what == "vectors" and by_name[feature].pooling == "none")
    rows = f"ids of {feature}" if per_id and feature not in tables.single else "batch"
    limited = {"below": _below(module, name.removeprefix("ids."))} if what == "ids" else {}
    return {"dtype": str(array.dtype), "shape": [rows, *array.shape[1:]], **limited}


def _below(module: ServedTables | Ranker, feature: str) -> int | None:
    """How many ids a feature has; None where all tables that read them take any int64."""
    reading = [module.tables, module.attention] if isinstance(module, Ranker) else [module]
    plans = [tables.plan for tables in reading if tables is not None]
    known = [(plan, each) for plan in plans for each in plan.features if each.name == feature]
    limited = any(plan.encodings[each.space].num_ids is not None for plan, each in known)
    return known[0][1].num_ids if limited else None


def made_inputs(module: ServedTables | Ranker, rows: int, random: np.random.Generator) -> Arrays:
    """Inputs of `rows` rows with bags of zero to five ids, extreme ids where the method takes any int64."""
    tables = module.tables if isinstance(module, Ranker) else module
    lengths = random.integers(0, 6, rows)
    lengths[:2] = (0, 5)  # of every history alike
    found: Arrays = {}
    features = {feature.name: feature for feature in tables.plan.features}
    for name in module.inputs():
        what, _, feature = name.partition(".")
        if name == "dense":
            found[name] = random.standard_normal((rows, module.num_dense), np.float32)  # type: ignore[arg-type]
        elif what == "offsets" and features[feature].pooling == "none":
            found[name] = np.cumsum([0, *lengths])
        elif tables.is_stacked:
            found[name] = np.stack([_ids(module, each, rows, random) for each in tables.names], axis=1)
        elif what == "ids":
            own = random.integers(0, 6, rows)
            own[:2] = (5, 0)
            bagged = tables.bagged(features[feature])
            total = rows if feature in tables.single else (own if bagged else lengths).sum()
            found[name] = _ids(module, feature, int(total), random)
            if bagged:
                found[f"offsets.{feature}"] = np.cumsum([0, *own])
        elif what == "weights":
            found[name] = random.uniform(-2, 2, len(found[f"ids.{feature}"])).astype(np.float32)
    return {name: found[name] for name in module.inputs()}


def _ids(module: ServedTables | Ranker, feature: str, total: int, random: np.random.Generator) -> np.ndarray:
    """Both ends of a feature's ids, others at random; extremes where all tables that read them take any int64."""
    tables = module.tables if isinstance(module, Ranker) else module
    num_ids = next(each.num_ids for each in tables.plan.features if each.name == feature)
    ids = random.integers(0, num_ids, total)
    ids[:2] = (num_ids - 1, 0)
    if _below(module, feature) is None:
        ids[2 : 2 + len(golden.EXTREMES)] = golden.EXTREMES[: max(total - 2, 0)]
    return ids


def outputs_of(module: ServedTables | Ranker, bundle: Bundle, given: Arrays) -> Arrays:
    """What a program must give, by the NumPy reader and the model in plain torch."""
    if isinstance(module, Ranker):
        return module.expected(bundle, given)
    found = {}
    if module.is_stacked:
        each = [bundle.vectors(name, module.ids_of(given, name)) for name in module.names]
        return {"vectors": np.stack(each, axis=1)}
    for feature in module.plan.features:
        name, ids = feature.name, given[f"ids.{feature.name}"]
        if module.bagged(feature):
            found[f"vectors.{name}"] = bundle.lookup(name, ids, given[f"offsets.{name}"], given.get(f"weights.{name}"))
        else:
            found[f"vectors.{name}"] = bundle.vectors(name, ids)
    return found


def compared(run: Run, given: Arrays, expected: Arrays, allowed: Mapping[str, float]) -> tuple[float, bool]:
    """The largest difference from the expected outputs, and whether all lie within tolerance."""
    got = run(given)
    fine = all(
        got[name].shape == array.shape and golden.within(got[name], array, allowed) for name, array in expected.items()
    )
    same = [name for name in expected if got[name].shape == expected[name].shape]
    worst = [float(np.abs(got[name] - expected[name]).max(initial=0)) for name in same]
    return max(worst, default=float("inf")), fine


def golden_answers(run: Run, plan: Mapping[str, Any]) -> golden.Answer:
    """What tables that take weights give for a bundle's golden vectors, those of all features in one call."""
    bagged = {entry["name"] for entry in plan["features"] if entry["pooling"] != "none"}

    def ask(given: golden.Inputs, kind: str) -> Arrays:
        inputs: Arrays = {}
        for name, each in given.items():
            ids = each["ids" if kind == "vectors" else "bag_ids"]
            inputs[f"ids.{name}"] = ids
            if name in bagged:
                inputs[f"offsets.{name}"] = np.arange(len(ids) + 1) if kind == "vectors" else each["offsets"]
                inputs[f"weights.{name}"] = each["weights"] if kind == "weighted" else np.ones(len(ids), np.float32)
        return run(inputs)

    def answers(given: golden.Inputs) -> golden.Outputs:
        outputs = {kind: ask(given, kind) for kind in (golden.OUTPUTS if bagged else golden.OUTPUTS[:1])}
        return {
            name: {
                kind: outputs[kind][f"vectors.{name}"]
                for kind in (golden.OUTPUTS if name in bagged else golden.OUTPUTS[:1])
            }
            for name in given
        }

    return answers


def eager(module: ServedTables) -> Run:
    """A module of tables as a program."""

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            found = module({name: torch.from_numpy(array.copy()) for name, array in inputs.items()})
        return {name: vectors.numpy() for name, vectors in found.items()}

    return run


def write_beside(bundle: Bundle, path: Path) -> None:
    """Writes the tables of a bundle as ONNX into its own folder; they take weights. See `golden_answers`."""
    kind = kind_of("onnx")
    module = ServedTables(bundle, weighted=True)
    example = made_inputs(module, 3, np.random.default_rng(0))
    kind.write(module, {name: torch.from_numpy(array) for name, array in example.items()}, path)
