"""The commands that look at bundles and exported programs: verify, inspect."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embtab.errors import UserError, listed
from embtab.text import printable

if TYPE_CHECKING:
    from embtab.reader import Bundle
    from embtab.reader.golden import Answer

_TRUST = "a program is code; add --run if you trust whoever made it"


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab verify BUNDLE."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `embtab export` wrote")
    parser.add_argument(
        "--delta",
        type=Path,
        action="append",
        default=[],
        help="apply this delta first; repeat in order of their making",
    )
    parser.add_argument(
        "--run",
        dest="run_programs",
        action="store_true",
        help="also run the exported programs (ONNX, AOTInductor) that lie there: code, so only from whom you trust",
    )
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    if _is_program(arguments.bundle) and not arguments.delta:
        _verify_program(arguments.bundle, arguments.run_programs)
        return
    from embtab.reader import Bundle, golden

    opened = Bundle(arguments.bundle, deltas=arguments.delta)
    answers = _decoders(opened)
    program = None if arguments.delta else _program_inside(opened, arguments.run_programs)  # it holds the base's rows
    if program is not None:
        answers["onnx"] = program
    found = {name: golden.differences(opened, answer) for name, answer in answers.items()}
    rows = [("feature", *found)]
    rows += [(feature, *(f"{found[name][feature][0]:.2g}" for name in found)) for feature in opened.features]
    print(table(rows))
    wrong = [f"{feature} by {name}" for name in found for feature, (_, fine) in found[name].items() if not fine]
    if wrong:
        raise UserError(f"{arguments.bundle}: differs from its golden vectors: {listed(wrong)}")
    print(f"{arguments.bundle}: all files are whole, and all differences within tolerance")


def _is_program(path: Path) -> bool:
    """Whether config.json says that it describes an exported program; whoever opens it checks that."""
    from embtab.reader.manifest import CONFIG, MAX_JSON

    config = path / CONFIG
    if not config.is_file() or config.stat().st_size > MAX_JSON:
        return False
    return b'"format": "embtab-program"' in config.read_bytes()


def _verify_program(path: Path, run: bool) -> None:
    from embtab.serving.program import Program

    program = Program(path, load=run)
    kind = program.config["kind"]
    if not run:
        program.golden()
        print(f"{path}: all files are whole; the {kind} program was not run: {_TRUST}")
        return
    worst, fine = program.difference()
    print(f"{kind}: largest difference {worst:.2g}")
    if not fine:
        raise UserError(f"{path}: the program differs from its golden outputs by {worst:.2g}")
    print(f"{path}: all files are whole, and all differences within tolerance")


def _program_inside(opened: Bundle, run: bool) -> Answer | None:
    """What the ONNX program in a bundle's folder answers, where it has one that may be run."""
    from embtab.serving.exported import golden_answers
    from embtab.serving.program import name_inside, program_inside

    if run:
        program = program_inside(opened)
        return None if program is None else golden_answers(program, opened.plan)
    name = name_inside(opened)
    if name is not None:
        print(f"{opened.path / name} was not run: {_TRUST}")
    return None


def _decoders(opened: Bundle) -> dict[str, Answer]:
    """Everything here that can decode the bundle from its data."""
    from embtab.bundle import load
    from embtab.bundle.writer import torch_answers
    from embtab.reader.golden import reader_answers
    from embtab.serving.exported import eager, golden_answers
    from embtab.serving.quantised import QuantisedTables
    from embtab.tables import EmbeddingBagCollection, EmbeddingCollection

    deltas = [delta.path for delta in opened.deltas]
    sequences = any(entry["pooling"] == "none" for entry in opened.plan["features"])
    kind = EmbeddingCollection if sequences else EmbeddingBagCollection
    found = {"reader": reader_answers(opened)}
    found |= {backend: torch_answers(load(opened.path, backend, kind, deltas)) for backend in ("torch", "fbgemm")}
    return {**found, "quantised": golden_answers(eager(QuantisedTables(opened, weighted=True)), opened.plan)}


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab inspect BUNDLE."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `embtab export` wrote")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from embtab.reader import Bundle

    config = Bundle(arguments.bundle, verify=False).config
    plan = config["plan"]
    written = f"written by {config['producer']}, {config['created']}"
    print(printable(f"{config['format']} version {config['version']}, {written}") + "\n")
    rows = [("feature", "ids", "pooling", "method", "any int64", "tables")]
    for feature in plan["features"]:
        encoding = plan["encodings"][feature["id_space"] or feature["name"]]
        takes_all = "yes" if encoding["num_ids"] is None else "no"
        tables = " + ".join(dict.fromkeys(encoding["tables"]))
        rows.append(
            (feature["name"], f"{feature['num_ids']}", feature["pooling"], encoding["method"], takes_all, tables)
        )
    print(table(rows) + "\n")
    stored = [("tensor", "type", "shape", "file")]
    stored += [
        (name, about["dtype"], " x ".join(map(str, about["shape"])), about["file"])
        for name, about in config["tensors"].items()
    ]
    print(table(stored) + "\n")
    files = [("file", "bytes", "sha256")]
    files += [(name, f"{about['bytes']}", about["sha256"]) for name, about in config["files"].items()]
    print(table(files))
    for title in ("provenance", "quality"):
        if config[title]:
            print(f"\n{title}\n{_facts(config[title])}")


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(printable(f"  {key}: {json.dumps(value, ensure_ascii=False)}") for key, value in facts.items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
