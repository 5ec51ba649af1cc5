"""The commands that make bundles and what is made of them: export, import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embtab.commands.verify import add_inspect, add_verify, table
from embtab.errors import UserError
from embtab.sizes import format_bytes

if TYPE_CHECKING:
    from embtab.reader import Bundle
    from embtab.tables import EmbeddingBagCollection

__all__ = ["add_export", "add_import", "add_inspect", "add_verify"]


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab export CKPT BUNDLE."""
    parser.add_argument("source", type=Path, metavar="CKPT", help="a checkpoint that `embtab fit` wrote, or a bundle")
    parser.add_argument("out", type=Path, metavar="BUNDLE", help="the folder to make")
    parser.add_argument(
        "--format",
        default="bundle",
        choices=("bundle", "onnx", "aoti", "parquet", "hugectr", "state_dict"),
        help="bundle (default); the whole ranker, or the tables of a bundle, as onnx or compiled (aoti); or, from a "
        "bundle, a plain vector per id (parquet, hugectr, state_dict)",
    )
    parser.add_argument("--onnx", action="store_true", help="put the tables as tables.onnx into the bundle too")
    parser.add_argument(
        "--config", type=Path, help="of the run, for onnx and aoti (default: config.yaml in the checkpoint's run)"
    )
    parser.add_argument(
        "--single", action="append", default=[], metavar="FEATURE",
        help="has one id in every row, so a program takes no offsets of it; repeatable, 'all' for all",
    )  # fmt: skip
    parser.add_argument(
        "--stacked", action="store_true",
        help="all features have one id in every row, and a program takes them as one array [rows, features]",
    )  # fmt: skip
    parser.add_argument(
        "--since", type=Path, action="append", default=[], metavar="BUNDLE",
        help="write only the rows that changed since this bundle; repeat for the deltas made after it, in order",
    )  # fmt: skip
    parser.add_argument(
        "--part", choices=("representation", "attention"),
        help="of a sequence model whose attention has tables of its own: which to take (default: representation)",
    )  # fmt: skip
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="take the vocabularies of this dataset folder along")
    parser.add_argument(
        "--other-data", action="store_true",
        help="--vocab names a folder that the checkpoint was not trained on, whose ids mean the same values",
    )  # fmt: skip
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
    from embtab.reader.manifest import CONFIG

    is_bundle = (arguments.source / CONFIG).is_file()
    if arguments.part and (is_bundle or arguments.format != "bundle"):
        raise UserError("--part is of checkpoints that become bundles or deltas; leave it out here")
    if arguments.since:
        _export_delta(arguments, is_bundle)
    elif arguments.format in ("onnx", "aoti"):
        _export_program(arguments, is_bundle)
    elif arguments.config or arguments.single or arguments.stacked:
        raise UserError("--config, --single and --stacked are of --format onnx and aoti; leave them out here")
    elif arguments.format != "bundle":
        _export_vectors(arguments, is_bundle)
    elif is_bundle:
        raise UserError(f"{arguments.source}: is a bundle already; choose another --format, or give a checkpoint")
    else:
        _export_bundle(arguments)
    _say_written(arguments.out, "delta" if arguments.since else arguments.format)


def _export_delta(arguments: argparse.Namespace, is_bundle: bool) -> None:
    from embtab.bundle.delta_writer import save_delta
    from embtab.bundle.writer import refuse_existing
    from embtab.training.checkpoint import described, load_tables, read_checkpoint

    given = (
        arguments.overwrite,
        arguments.precision,
        arguments.vocab,
        arguments.onnx,
        arguments.config,
        arguments.single,
        arguments.stacked,
    )
    if arguments.format != "bundle" or any(given) or is_bundle:
        raise UserError(
            "--since takes a checkpoint, writes a delta, and goes with no other option but --quality and --part"
        )
    refuse_existing(arguments.out, overwrite=False)
    about = described(read_checkpoint(arguments.source), arguments.source)["about"]
    tables = load_tables(arguments.source, part=_part(arguments))
    counts = save_delta(tables, arguments.out, arguments.since, quality=_quality(arguments.quality), provenance=about)
    print(table([("tensor", "rows changed"), *((name, f"{count}") for name, count in counts.items())]))


def _export_program(arguments: argparse.Namespace, is_bundle: bool) -> None:
    from embtab.bundle import save
    from embtab.bundle.writer import refuse_existing
    from embtab.files import hidden
    from embtab.reader import Bundle
    from embtab.serving.exported import export
    from embtab.serving.ranker import Ranker, load_trained
    from embtab.serving.tables import ServedTables

    if arguments.overwrite or arguments.vocab or arguments.quality or arguments.onnx:
        raise UserError("--overwrite, --vocab, --quality and --onnx are of bundles; leave them out here")
    if arguments.stacked and arguments.single:
        raise UserError("--single has no meaning beside --stacked, where every feature has one id in every row")
    refuse_existing(arguments.out, overwrite=False)
    if is_bundle:
        if arguments.precision or arguments.config:
            raise UserError("--precision and --config are of checkpoints; a bundle has its precision and no ranker")
        opened = Bundle(arguments.source)
        single = _single(arguments.single, opened)
        tables = ServedTables(opened, weighted=True, single=single, stacked=arguments.stacked)
        export(tables, opened, arguments.out, arguments.format)
        return
    trained = load_trained(arguments.source, arguments.config)
    with hidden(arguments.out.with_name(f"{arguments.out.name}.tables")) as folder:
        save(trained.tables, folder / "bundle", precision=arguments.precision)
        opened = Bundle(folder / "bundle", verify=False)
        attention = None
        if trained.attention is not None:
            save(trained.attention, folder / "attention", precision=arguments.precision)
            attention = Bundle(folder / "attention", verify=False)
        single = _single(arguments.single, opened)
        form = {"single": single, "stacked": arguments.stacked}
        ranker = Ranker(opened, trained.model, trained.num_dense, attention=attention, **form)
        export(ranker, opened, arguments.out, arguments.format, trained.about)


def _single(named: Sequence[str], bundle: Bundle) -> list[str]:
    return (
        [entry["name"] for entry in bundle.plan["features"] if entry["pooling"] != "none"]
        if "all" in named
        else list(named)
    )


def _export_vectors(arguments: argparse.Namespace, is_bundle: bool) -> None:
    from embtab.bundle.materialise import materialise
    from embtab.reader import Bundle

    if not is_bundle:
        raise UserError(f"{arguments.source}: not a bundle; export the checkpoint as a bundle first, then from there")
    if arguments.overwrite or arguments.precision or arguments.vocab or arguments.quality or arguments.onnx:
        raise UserError("--overwrite, --precision, --vocab, --quality and --onnx are of bundles; leave them out here")
    materialise(Bundle(arguments.source), arguments.format, arguments.out)


def _export_bundle(arguments: argparse.Namespace) -> None:
    from embtab.bundle import save
    from embtab.bundle.writer import refuse_existing
    from embtab.datasets.schema import Dataset
    from embtab.training.checkpoint import check_data, described, load_tables, read_checkpoint

    refuse_existing(arguments.out, arguments.overwrite)
    checkpoint = read_checkpoint(arguments.source)
    entry = described(checkpoint, arguments.source)
    if arguments.vocab and not arguments.other_data:
        check_data(entry["about"], Dataset.load(arguments.vocab).fingerprint, "add --other-data")
    trained: dict[str, Any] = {key: checkpoint[key] for key in ("epoch", "global_step") if key in checkpoint}
    save(
        load_tables(arguments.source, part=_part(arguments)),
        arguments.out,
        vocab=arguments.vocab,
        quality=_quality(arguments.quality),
        provenance={**entry["about"], **trained, "versions": entry["versions"]},
        precision=arguments.precision,
        overwrite=arguments.overwrite,
        onnx=arguments.onnx,
    )


def _part(arguments: argparse.Namespace) -> str:
    """The tables that --part names, as a checkpoint calls them."""
    return "attention" if arguments.part == "attention" else "tables"


def _say_written(path: Path, kind: str = "bundle") -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    checked = ("bundle", "onnx", "aoti")
    print(
        f"{path}: {format_bytes(size)}"
        + (f"; check it with `embtab verify {path}{'' if kind == 'bundle' else ' --run'}`" if kind in checked else "")
    )


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
        help="regular expression for names of tensors; its first group is the feature (default: the whole name); or "
        "embtab, torchrec or fuxictr, for the names that these write",
    )
    parser.add_argument(
        "--ranker", type=Path, metavar="CKPT", help="trained on the dense tables: say what the import costs in test AUC"
    )
    parser.add_argument("--config", type=Path, help="of the ranker's run (default: config.yaml in its run)")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="EPOCHS", help="train the tables under the ranker")
    parser.add_argument(
        "--table-lr", type=float, default=0.02, help="of the tables, to fine-tune (default %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=0.001, help="of their projections and such (default %(default)s)")
    _add_written(parser)
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from embtab.bundle import load, save
    from embtab.bundle.writer import refuse_existing
    from embtab.convert import from_dense
    from embtab.convert.dense import features_of, read_dense, reconstruction_errors
    from embtab.features import id_spaces
    from embtab.planning import plan
    from embtab.planning.specs import read_option

    refuse_existing(arguments.out, arguments.overwrite)
    if arguments.fine_tune and not arguments.ranker:
        raise UserError("--fine-tune needs the ranker that was trained on the dense tables; give it by --ranker")
    if arguments.ranker and not arguments.data:
        raise UserError("--ranker needs data to measure on; give a dataset folder by --data")
    weights = read_dense(arguments.dense, arguments.pattern)
    features = features_of(weights, arguments.data)
    dim = next(iter(weights.values())).shape[1]
    options = dict(read_option(text) for text in arguments.option)
    planned = plan(features, arguments.method, arguments.budget, dim, arguments.seed, arguments.precision, **options)
    print(planned.describe())
    tables = from_dense(weights, planned)
    quality = _quality(arguments.quality)
    if arguments.ranker:
        tables, measured = _under_its_ranker(arguments, tables)
        quality |= measured
    origin = {"imported_from": [path.name for path in arguments.dense]}
    save(tables, arguments.out, quality=quality, provenance=origin, overwrite=arguments.overwrite)
    counts = {space.name: space.counts for space in id_spaces(features)}
    errors = reconstruction_errors(load(arguments.out), weights, counts)
    print(table([("feature", "relative error"), *((name, f"{error:.4f}") for name, error in errors.items())]))
    _say_written(arguments.out)


def _under_its_ranker(
    arguments: argparse.Namespace, tables: EmbeddingBagCollection
) -> tuple[EmbeddingBagCollection, dict[str, float]]:
    """The tables, fine-tuned where asked for, and their test AUC beside that of the ranker's own."""
    from embtab.convert.fine_tune import auc_of, fine_tuned
    from embtab.serving.ranker import load_trained

    trained = load_trained(arguments.ranker, arguments.config)
    if trained.attention is not None:
        raise UserError(f"{arguments.ranker}: its attention has tables of its own, which an import does not replace")
    names = [feature.name for feature in trained.tables.plan.features]
    if names != [feature.name for feature in tables.plan.features]:
        raise UserError(f"{arguments.ranker}: its ranker reads {', '.join(names)}; import a table for each of them")
    tables.round_to_served()
    found = {"auc_dense": auc_of(trained.tables, trained.model, arguments.data)}
    found["auc_imported"] = auc_of(tables, trained.model, arguments.data)
    if arguments.fine_tune:
        settings = {"lr": arguments.lr, "table_lr": arguments.table_lr, "seed": arguments.seed}
        tables = fine_tuned(tables, trained.model, arguments.data, arguments.fine_tune, **settings)
        found["auc_fine_tuned"] = auc_of(tables, trained.model, arguments.data)
    for name, value in found.items():
        print(f"{name}: {value:.4f} ({value - found['auc_dense']:+.4f})")
    return tables, found
