"""The commands about datasets: prepare, check-data."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from embtab.commands.parser import Parser
from embtab.errors import UserError


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab prepare."""
    kinds = parser.add_subparsers(title="datasets", metavar="DATASET", required=True, parser_class=Parser)

    criteo = kinds.add_parser("criteo", help="Criteo display advertising: tab-separated, plain or .gz, in time order")
    criteo.add_argument("raw", type=Path, nargs="+", metavar="RAW", help="files in time order, or a folder of them")
    criteo.add_argument("--min-count", type=int, default=2, help="rarer values share id 0 (default %(default)s)")
    criteo.add_argument(
        "--dense-transform",
        default="log",
        choices=("log", "log1p", "none"),
        help="of I1..I13 (default %(default)s: ln(x)^2 above 2)",
    )
    criteo.add_argument(
        "--blank", type=float, default=0.0, help="what a blank integer becomes; -0.5 is told from all (default 0)"
    )
    criteo.add_argument(
        "--hashed", action="store_true", help="take categories as ids as they stand, without a vocabulary; for hashing"
    )
    _add_shares(criteo, 0.1, 0.1)
    criteo_options = ("min_count", "dense_transform", "blank", "valid", "test", "hashed")
    criteo.set_defaults(run=_prepare, kind="criteo", options=criteo_options)

    movielens = kinds.add_parser("movielens", help="ml-100k ratings in time order, or ml-1m pairs with drawn negatives")
    movielens.add_argument("raw", type=Path, metavar="RAW", help="the folder of the raw files")
    movielens.add_argument("--negatives", type=int, default=1, help="per pair of ml-1m (default %(default)s)")
    movielens.add_argument("--seed", type=int, default=0, help="of negatives and split (default %(default)s)")
    _add_shares(movielens, 0.1, 0.2)
    movielens.set_defaults(run=_prepare, kind="movielens", options=("negatives", "seed", "valid", "test"))

    frappe = kinds.add_parser("frappe", help="Frappe app usage, libsvm files")
    frappe.add_argument("raw", type=Path, metavar="RAW", help="the folder of the raw files")
    frappe.set_defaults(run=_prepare, kind="frappe", options=())

    synthetic = kinds.add_parser("synthetic", help="Criteo-shaped data of any size whose best possible AUC is known")
    synthetic.add_argument("--rows", type=int, default=1_000_000, help="(default %(default)s)")
    synthetic.add_argument(
        "--scale", type=float, default=1.0, help="times Criteo's cardinalities (default %(default)s)"
    )
    synthetic.add_argument("--multi", type=int, default=0, help="features that hold several ids (default %(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    _add_shares(synthetic, 0.1, 0.1)
    synthetic.set_defaults(run=_prepare, kind="synthetic", options=("rows", "scale", "multi", "seed", "valid", "test"))

    sequences = kinds.add_parser("sequences", help="behaviour logs: each target with the events before it")
    _add_sequences(sequences)

    table = kinds.add_parser("table", help="any CSV or Parquet table; a YAML file says what its columns are")
    table.add_argument("raw", type=Path, nargs="+", metavar="FILES", help="files, or folders of them")
    table.add_argument("--roles", type=Path, required=True, metavar="YAML", help="see docs/your-data.md")
    table.set_defaults(run=_prepare, kind="table", options=("roles",))

    avazu = kinds.add_parser("avazu", help="Avazu click logs: CSV, plain or .gz, split by the hour")
    avazu.add_argument("raw", type=Path, nargs="+", metavar="RAW", help="files, or folders of them")
    avazu.add_argument("--min-count", type=int, default=2, help="rarer values share id 0 (default %(default)s)")
    _add_shares(avazu, 0.1, 0.1)
    avazu.set_defaults(run=_prepare, kind="avazu", options=("min_count", "valid", "test"))

    for kind in (criteo, movielens, frappe, synthetic, sequences, table, avazu):
        kind.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to make")
        kind.add_argument("--if-absent", action="store_true", help="do nothing where DIR is a dataset already")


def _add_sequences(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("raw", type=Path, nargs="?", metavar="RAW", help="a log, or the folder of ml-100k")
    sources.add_argument("--generate", action="store_true", help="long histories whose best possible AUC is known")
    log = parser.add_argument_group("of a log")
    log.add_argument("--kind", default="auto", help="auto (by the name), s3rec, ml-100k, taobao or amazon")
    log.add_argument("--split", default="leave-one-out", help="or time (default %(default)s)")
    log.add_argument("--max-history", type=int, default=200, help="events kept, the last ones (default %(default)s)")
    log.add_argument("--targets", type=int, default=20, help="training targets per user (default %(default)s)")
    log.add_argument("--negatives", type=int, default=1, help="per training target (default %(default)s)")
    log.add_argument("--eval-negatives", type=int, default=99, help="of other targets (default %(default)s)")
    log.add_argument("--sampler", default="uniform", help="of negatives; or popularity (default %(default)s)")
    log.add_argument("--min-events", type=int, default=3, help="of a user that is kept (default %(default)s)")
    generated = parser.add_argument_group("with --generate")
    generated.add_argument("--users", type=int, default=5_000, help="(default %(default)s)")
    generated.add_argument("--length", type=int, default=200, help="of histories, give or take a quarter (default 200)")
    generated.add_argument("--items", type=int, default=5_000, help="(default %(default)s)")
    generated.add_argument("--interests", type=int, default=50, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    _add_shares(parser, 0.1, 0.1)
    parser.set_defaults(run=_prepare_sequences)


def _add_shares(parser: argparse.ArgumentParser, valid: float, test: float) -> None:
    parser.add_argument("--valid", type=float, default=valid, help="share of the rows (default %(default)s)")
    parser.add_argument("--test", type=float, default=test, help="share of the rows (default %(default)s)")


def _skipped(arguments: argparse.Namespace) -> bool:
    """Whether the dataset is there already and that is fine."""
    there = arguments.if_absent and (arguments.out / "dataset.json").exists()
    if there:
        print(f"{arguments.out}: already prepared", file=sys.stderr)
    return there


def _prepare(arguments: argparse.Namespace) -> None:
    """Runs `prepare` of the kind's module with the options its parser has."""
    if not _skipped(arguments):
        module = importlib.import_module(f"embtab.datasets.{arguments.kind}")
        folders = [arguments.raw, arguments.out] if "raw" in arguments else [arguments.out]
        dataset = module.prepare(*folders, **{name: getattr(arguments, name) for name in arguments.options})
        _say_prepared(arguments.out, dataset)


def _prepare_sequences(arguments: argparse.Namespace) -> None:
    from embtab.datasets import long_histories, sequences

    if _skipped(arguments):
        return
    shares = {"valid": arguments.valid, "test": arguments.test, "seed": arguments.seed}
    if arguments.generate:
        dataset = long_histories.prepare(
            arguments.out,
            users=arguments.users,
            min_length=arguments.length - arguments.length // 4,
            max_length=arguments.length + arguments.length // 4,
            items=arguments.items,
            interests=arguments.interests,
            **shares,
        )
    else:
        dataset = sequences.prepare(
            arguments.raw,
            arguments.out,
            kind=arguments.kind,
            split=arguments.split,
            max_history=arguments.max_history,
            targets=arguments.targets,
            negatives=arguments.negatives,
            eval_negatives=arguments.eval_negatives,
            sampler=arguments.sampler,
            min_events=arguments.min_events,
            **shares,
        )
    _say_prepared(arguments.out, dataset)


def _say_prepared(out: Path, dataset: object) -> None:
    from embtab.datasets.drift import drift_line
    from embtab.datasets.schema import SPLITS, Dataset

    assert isinstance(dataset, Dataset)
    rows = ", ".join(f"{dataset.rows(split):,} {split}" for split in SPLITS)
    ids = sum(column.num_ids for column in dataset.features)
    best = f"; Bayes AUC {dataset.bayes['auc']:.4f}" if dataset.bayes else ""
    print(f"{out}: {rows} rows, {len(dataset.features)} features with {ids:,} ids{best}")
    for split in SPLITS[1:]:
        if dataset.rows(split):
            print(drift_line(out, split))


def add_check_data(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab check-data."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a dataset folder")
    parser.set_defaults(run=_check_data)


def _check_data(arguments: argparse.Namespace) -> None:
    from embtab.datasets.check import check

    problems = check(arguments.dir)
    for problem in problems:
        print(problem)
    warnings = sum(problem.warning for problem in problems)
    if len(problems) > warnings:
        raise UserError(f"{arguments.dir}: {len(problems) - warnings} problems found")
    if warnings:
        print(f"{arguments.dir}: can be used; {warnings} {'warning' if warnings == 1 else 'warnings'}")
        return
    print(f"{arguments.dir}: no problems found")
