"""Bundles: trained tables as a folder that any ranker can read, with or without embtab. docs/bundle.md is the contract.

tables.safetensors      rows of every physical table in its precision, and the encodings' arrays
golden.safetensors      ids and bags, and the vectors they must give
vocabulary.safetensors  raw value -> id, where given
README.md               the model card
config.json             everything else, with the sha256 of every file; written last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embtab import __version__, files
from embtab.bundle import card
from embtab.bundle.vocabulary import Vocabulary, vocabulary_tensors
from embtab.errors import UserError
from embtab.methods import PRECISIONS, Table
from embtab.planning import Plan
from embtab.quantise import quantise
from embtab.reader import Bundle, golden
from embtab.reader.manifest import CONFIG, write_signed
from embtab.reader.read import VOCABULARY, physical
from embtab.reader.schema import FORMAT, VERSION, open_tensors, read_config, tensor_specs
from embtab.tables import EmbeddingBagCollection
from embtab.tables.base import Collection

PROGRAM = "tables.onnx"
MAX_FILE_BYTES = 2_000_000_000
_LARGEST_FP16 = 65504.0

C = TypeVar("C", bound=Collection)
Vectors = Mapping[str, np.ndarray]
"""Arrays by feature."""


@torch.no_grad()
def save(
    tables: Collection,
    path: str | Path,
    *,
    vocab: Vocabulary | None = None,
    quality: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    onnx: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes trained tables as a bundle: all of it or, when anything fails, nothing.

    Args:
        tables: an `EmbeddingBagCollection` or `EmbeddingCollection`.
        path: the folder to make.
        vocab: raw values by feature, in the order of their ids; or a prepared dataset folder, whose vocabularies are
            taken.
        quality: what was measured, such as {"auc": 0.8}; for the model card.
        provenance: where the tables come from, such as {"dataset": "criteo", "fingerprint": "..."}.
        precision: of the stored rows, in place of the plan's.
        overwrite: replace the bundle at `path`, in one step.
        onnx: write the tables as tables.onnx into the bundle too.
        max_file_bytes: tables go to several files where one would be larger; one table always stays in one file.

    Raises:
        UserError: when `path` holds something that may not be replaced, or a row cannot be stored: it names both
            table and row.
        BundleError: when the plan is none that a bundle can describe.
    """
    folder = Path(path)
    refuse_existing(folder, overwrite)
    plan = tables.plan if precision is None else in_precision(tables.plan, precision)
    described = plan.to_dict()
    arrays: list[dict[str, Any]] = [
        {"space": space, "name": name, "dtype": spec.dtype, "shape": list(spec.shape)}
        for space, encoding in plan.encodings.items()
        for name, spec in encoding.arrays().items()
        if spec.serving
    ]
    with files.replaced_folder(folder) as beside:
        places = _write_tables(tables, plan, beside, max_file_bytes)
        tensors = {
            name: {"file": places[name], "dtype": dtype, "shape": shape}
            for name, (dtype, shape) in tensor_specs(described, arrays).items()
        }
        if vocab is not None:
            save_file(vocabulary_tensors(vocab, plan), beside / VOCABULARY)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "producer": f"embtab {__version__}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "rules": card.RULES,
            "plan": described,
            "arrays": arrays,
            "tensors": tensors,
            "golden": {"file": golden.FILE, **_write_golden(tables, described, beside, tensors)},
            "provenance": dict(provenance or {}),
            "quality": dict(quality or {}),
        }
        if onnx:
            _write_program(beside, about)
        files.write_text(beside / "README.md", card.model_card(plan, about))
        write_signed(beside, about)
        read_config(beside)  # as whoever opens it will


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raises UserError unless a bundle may be written at `folder`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder}: already exists; overwrite it explicitly or choose another folder")
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: exists and is not a bundle, so it will not be overwritten")


def in_precision(plan: Plan, precision: str) -> Plan:
    """The plan with the rows of every table in a precision; without its budget where they no longer fit it.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    tables = {name: dataclasses.replace(table, precision=precision) for name, table in plan.tables.items()}
    changed = dataclasses.replace(plan, tables=tables)
    return (
        changed if plan.budget is None or changed.nbytes <= plan.budget else dataclasses.replace(changed, budget=None)
    )


def stored_tensors(table: Table, rows: Tensor) -> dict[str, Tensor]:
    """What a bundle stores of the rows [R, W] of a table, by name.

    Raises:
        UserError: naming table and row, when a number is not finite, or beyond float16 where that is needed.
    """
    largest = torch.finfo(torch.float32).max if table.precision == "fp32" else _LARGEST_FP16
    refuse_beyond(f"table {table.name!r}", rows, largest)
    if table.precision == "fp32":
        return {f"rows.{table.name}": rows.contiguous()}
    if table.precision == "fp16":
        return {f"rows.{table.name}": rows.half()}
    bits = PRECISIONS[table.precision].bits
    stored, scales, offsets = quantise(rows, bits)
    if bits == 4:
        padded = torch.nn.functional.pad(stored, (0, stored.shape[1] % 2))
        stored = padded[:, ::2] | padded[:, 1::2] << 4
    return {f"rows.{table.name}": stored, f"scales.{table.name}": scales, f"offsets.{table.name}": offsets}


def refuse_beyond(what: str, rows: Tensor, largest: float) -> None:
    """Raises UserError naming the first row that holds NaN, infinity or a number beyond `largest`."""
    bad = ~(rows.abs() <= largest).reshape(len(rows), -1).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise UserError(
            f"{what}: row {row} holds a number that is not finite or beyond {largest:.6g}, so it cannot be stored; "
            "train with a smaller learning rate, or store it in fp32"
        )


def _write_tables(tables: Collection, plan: Plan, folder: Path, max_file_bytes: int) -> dict[str, str]:
    """The file of each tensor. Tables are written in order, as many to a file as fit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, table in plan.tables.items():
        if groups[-1] and filled + table.nbytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += table.nbytes
    places: dict[str, str] = {}
    for i, group in enumerate(groups, start=1):
        file = "tables.safetensors" if len(groups) == 1 else f"tables-{i:05}-of-{len(groups):05}.safetensors"
        content: dict[str, Tensor] = {}
        for name in group:
            content |= stored_tensors(plan.tables[name], tables.lookup.table(name).cpu().float())
        if i == 1:
            for name, array in tables.arrays.named_state().items():
                if array.is_floating_point():
                    refuse_beyond(f"array {name!r}", array, torch.finfo(torch.float32).max)
                content[f"arrays.{name}"] = array.cpu().contiguous()
        save_file(content, folder / file)
        places |= dict.fromkeys(content, file)
    return places


def _write_golden(
    tables: Collection, described: Mapping[str, Any], folder: Path, tensors: Mapping[str, Any]
) -> dict[str, float]:
    """Writes the golden set and gives its tolerance. The vectors are the reader's, from the rows as they were stored.

    Raises:
        UserError: when the tables in memory give other vectors (rows in fp32 must give the same).
    """
    given = golden.inputs(described)
    opened = Bundle.of(folder, described, physical(described, open_tensors(folder, tensors)))
    outputs = golden.reader_answers(opened)(given)
    tolerance = golden.tolerance(outputs)
    if all(table["precision"] == "fp32" for table in described["tables"]):
        for feature, got in torch_answers(tables)(given).items():
            if not all(golden.within(got[key], outputs[feature][key], tolerance) for key in got):
                raise UserError(
                    f"feature {feature!r}: what was written does not give the vectors of the tables in memory"
                )
    content = {f"{k}.{f}": torch.from_numpy(a) for f in given for k, a in {**given[f], **outputs[f]}.items()}
    save_file(content, folder / golden.FILE)
    return tolerance


def _write_program(folder: Path, about: dict[str, Any]) -> None:
    """Writes tables.onnx and checks its vectors.

    Raises:
        UserError: when they are not the golden ones, or ONNX is not installed.
    """
    from embtab.serving.exported import golden_answers, kind_of, write_beside

    opened = Bundle.of(folder, about["plan"], physical(about["plan"], open_tensors(folder, about["tensors"])))
    opened.config = about
    write_beside(opened, folder / PROGRAM)
    answer = golden_answers(kind_of("onnx").load(folder / PROGRAM), about["plan"])
    wrong = [name for name, (_, fine) in golden.differences(opened, answer).items() if not fine]
    if wrong:
        raise UserError(f"tables.onnx does not give the vectors of {', '.join(wrong)}; nothing was written")
    about["programs"] = {"onnx": PROGRAM}


def torch_answers(tables: Collection) -> golden.Answer:
    """What a collection gives for golden ids and bags, those of all features in one batch."""

    def ask(ids: Vectors, lengths: Vectors, weights: Vectors | None = None) -> Vectors:
        bags = max(map(len, lengths.values()))  # features with fewer get empty ones at the end
        batch = KeyedJaggedTensor(
            list(ids),
            _in_a_row(ids),
            None if weights is None else _in_a_row(weights),
            _in_a_row({name: np.pad(each, (0, bags - len(each))) for name, each in lengths.items()}),
        )
        training = tables.training  # in which adaptive methods would count these ids
        with torch.no_grad():
            answer = tables.eval()(batch)
        tables.train(training)
        if isinstance(answer, KeyedTensor):
            return {name: found[: len(lengths[name])].float().cpu().numpy() for name, found in answer.to_dict().items()}
        return {name: found.values().float().cpu().numpy() for name, found in answer.items()}

    def answers(given: golden.Inputs) -> golden.Outputs:
        ids = {name: each["ids"] for name, each in given.items()}
        found = {"vectors": ask(ids, {name: np.ones(len(each), np.int64) for name, each in ids.items()})}
        if isinstance(tables, EmbeddingBagCollection):
            bag_ids = {name: each["bag_ids"] for name, each in given.items()}
            lengths = {name: np.diff(each["offsets"]) for name, each in given.items()}
            weights = {name: each["weights"] for name, each in given.items()}
            found |= {"pooled": ask(bag_ids, lengths), "weighted": ask(bag_ids, lengths, weights)}
        return {name: {key: vectors[name] for key, vectors in found.items()} for name in given}

    return answers


def _in_a_row(arrays: Vectors) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays.values())))
