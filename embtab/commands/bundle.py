"""The commands about bundles: export, import, verify, inspect."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embtab.errors import UserError
from embtab.sizes import format_bytes

if TYPE_CHECKING:
    from embtab.golden import Answer
    from embtab.reader import Bundle


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab export CKPT BUNDLE."""
    parser.add_argument("source", type=Path, metavar="CKPT", help="a checkpoint that `embtab fit` wrote, or a bundle")
    parser.add_argument("out", type=Path, metavar="BUNDLE", help="the folder to make")
    parser.add_argument(
        "--format",
        default="bundle",
        choices=("bundle", "parquet", "hugectr", "state_dict"),
        help="bundle (default); or, from a bundle, a plain vector per id",
    )
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="take the vocabularies of this dataset folder along")
    _add_written(parser)
    parser.set_defaults(run=_export)


def _add_written(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", help="of the stored rows: fp32, fp16, int8 or int4 (default: the plan's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle that is there, in one step")
    parser.add_argument(
        "--quality", action="append", default=[], metavar="KEY=NUMBER", help="for the model card, such as auc=0.8"
    )


def _quality(texts: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            raise UserError(f"--quality {text!r}: write KEY=NUMBER, such as auc=0.8") from None
    return found


def _export(arguments: argparse.Namespace) -> None:
    from embtab.signed import CONFIG

    is_bundle = (arguments.source / CONFIG).is_file()
    if arguments.format != "bundle":
        _export_vectors(arguments, is_bundle)
    elif is_bundle:
        raise UserError(f"{arguments.source}: is a bundle already; choose another --format, or give a checkpoint")
    else:
        _export_bundle(arguments)
    _say_written(arguments.out, arguments.format)


def _export_vectors(arguments: argparse.Namespace, is_bundle: bool) -> None:
    from embtab.materialise import materialise
    from embtab.reader import Bundle

    if not is_bundle:
        raise UserError(f"{arguments.source}: not a bundle; export the checkpoint as a bundle first, then from there")
    if arguments.overwrite or arguments.precision or arguments.vocab or arguments.quality:
        raise UserError("--overwrite, --precision, --vocab and --quality are of bundles; leave them out here")
    materialise(Bundle(arguments.source), arguments.format, arguments.out)


def _export_bundle(arguments: argparse.Namespace) -> None:
    from embtab.bundle import refuse_existing, save
    from embtab.training.checkpoint import described, load_tables, read_checkpoint

    refuse_existing(arguments.out, arguments.overwrite)
    checkpoint = read_checkpoint(arguments.source)
    entry = described(checkpoint, arguments.source)
    trained: dict[str, Any] = {key: checkpoint[key] for key in ("epoch", "global_step") if key in checkpoint}
    save(
        load_tables(arguments.source),
        arguments.out,
        vocab=arguments.vocab,
        quality=_quality(arguments.quality),
        provenance={**entry["about"], **trained, "versions": entry["versions"]},
        precision=arguments.precision,
        overwrite=arguments.overwrite,
    )


def _say_written(path: Path, kind: str = "bundle") -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{path}: {format_bytes(size)}" + (f"; check it with `embtab verify {path}`" if kind == "bundle" else ""))


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab verify BUNDLE."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `embtab export` wrote")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    from embtab import golden
    from embtab.reader import Bundle

    opened = Bundle(arguments.bundle)
    found = {name: golden.differences(opened, answer) for name, answer in _decoders(opened).items()}
    rows = [("feature", *found)]
    rows += [(feature, *(f"{found[name][feature][0]:.2g}" for name in found)) for feature in opened.features]
    print(_table(rows))
    wrong = [f"{feature} by {name}" for name in found for feature, (_, fine) in found[name].items() if not fine]
    if wrong:
        raise UserError(f"{arguments.bundle}: differs from its golden vectors: {', '.join(wrong)}")
    print(f"{arguments.bundle}: all files are whole, and all differences within tolerance")


def _decoders(opened: Bundle) -> dict[str, Answer]:
    """Everything here that can decode the bundle."""
    from embtab.bundle import load, torch_answers
    from embtab.collections import EmbeddingBagCollection, EmbeddingCollection
    from embtab.golden import reader_answers

    sequences = any(entry["pooling"] == "none" for entry in opened.plan["features"])
    kind = EmbeddingCollection if sequences else EmbeddingBagCollection
    answers = {backend: torch_answers(load(opened.path, backend, kind)) for backend in ("torch", "fbgemm")}
    return {"reader": reader_answers(opened), **answers}


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab inspect BUNDLE."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `embtab export` wrote")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from embtab.reader import Bundle

    config = Bundle(arguments.bundle, verify=False).config
    plan = config["plan"]
    print(f"{config['format']} version {config['version']}, written by {config['producer']}, {config['created']}\n")
    rows = [("feature", "ids", "pooling", "method", "any int64", "tables")]
    for feature in plan["features"]:
        encoding = plan["encodings"][feature["id_space"] or feature["name"]]
        takes_all = "yes" if encoding["num_ids"] is None else "no"
        tables = " + ".join(dict.fromkeys(encoding["tables"]))
        rows.append(
            (feature["name"], f"{feature['num_ids']}", feature["pooling"], encoding["method"], takes_all, tables)
        )
    print(_table(rows) + "\n")
    stored = [("tensor", "type", "shape", "file")]
    stored += [
        (name, about["dtype"], " x ".join(map(str, about["shape"])), about["file"])
        for name, about in config["tensors"].items()
    ]
    print(_table(stored) + "\n")
    files = [("file", "bytes", "sha256")]
    files += [(name, f"{about['bytes']}", about["sha256"]) for name, about in config["files"].items()]
    print(_table(files))
    for title in ("provenance", "quality"):
        if config[title]:
            print(f"\n{title}\n{_facts(config[title])}")


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab import DENSE --budget 8MB --method M --out BUNDLE."""
    parser.add_argument(
        "dense", type=Path, nargs="+", metavar="DENSE", help="dense tables: safetensors, npy, Parquet or a torch file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to make")
    parser.add_argument("--budget", help='serving bytes: 8000000, "8MB", "8MiB" or "0.1x" of the dense tables')
    parser.add_argument("--method", default="unified", help="name of a method (default %(default)s)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the method, such as op=sum; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the hashes (default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a dataset folder, for id counts and pooling")
    parser.add_argument(
        "--pattern",
        help="regular expression for names of tensors; its first group is the feature (default: the whole name)",
    )
    _add_written(parser)
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from embtab.bundle import load, refuse_existing, save
    from embtab.commands.parser import read_option
    from embtab.features import id_spaces
    from embtab.importing import features_of, from_dense, read_dense, reconstruction_errors
    from embtab.planning import plan

    refuse_existing(arguments.out, arguments.overwrite)
    weights = read_dense(arguments.dense, arguments.pattern)
    features = features_of(weights, arguments.data)
    dim = next(iter(weights.values())).shape[1]
    options = dict(read_option(text) for text in arguments.option)
    precision = arguments.precision or "fp32"
    planned = plan(features, arguments.method, arguments.budget, dim, arguments.seed, precision, **options)
    print(planned.describe())
    tables = from_dense(weights, planned)
    origin = {"imported_from": [path.name for path in arguments.dense]}
    save(tables, arguments.out, quality=_quality(arguments.quality), provenance=origin, overwrite=arguments.overwrite)
    counts = {space.name: space.counts for space in id_spaces(features)}
    errors = reconstruction_errors(load(arguments.out), weights, counts)
    print(_table([("feature", "relative error"), *((name, f"{error:.4f}") for name, error in errors.items())]))
    _say_written(arguments.out)
