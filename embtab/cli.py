"""The command line. Heavy imports wait until a command needs them: `embtab --help` answers at once.

A mistake of the user is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from embtab import __version__, bundle_commands
from embtab.errors import UserError

TRAINING = {
    "fit": "train a ranker and its tables from a configuration (LightningCLI)",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write a checkpoint's predictions for the test split",
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and points to the help."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command."""
    given = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait make fbgemm ten times slower on a machine that is shared (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # a hint to developers of torchrec, at its import
    try:
        if given and given[0] in TRAINING:
            from embtab.training.cli import main as train

            train(given)
        else:
            arguments = build_parser().parse_args(given)
            arguments.run(arguments)
    except UserError as error:
        print(f"embtab: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("embtab: interrupted", file=sys.stderr)
        sys.exit(130)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but the training ones, which are LightningCLI's."""
    parser = Parser(prog="embtab", description="Embedding tables that fit a byte budget.")
    parser.add_argument("--version", action="version", version=f"embtab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_prepare(commands.add_parser("prepare", help="turn raw files into a dataset folder of Parquet"))
    _add_check_data(commands.add_parser("check-data", help="say what is wrong in a dataset folder, and where"))
    _add_plan(commands.add_parser("plan", help="show the tables that fit a byte budget"))
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_compare(commands.add_parser("compare", help="compare methods at equal bytes: methods x budgets x seeds"))
    bundle_commands.add_export(commands.add_parser("export", help="write a checkpoint's tables as a bundle"))
    bundle_commands.add_import(commands.add_parser("import", help="fit dense tables into a plan, and write a bundle"))
    bundle_commands.add_verify(commands.add_parser("verify", help="recompute a bundle's golden vectors"))
    bundle_commands.add_inspect(commands.add_parser("inspect", help="show what is inside a bundle"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
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
    _add_shares(criteo, 0.1, 0.1)
    criteo.set_defaults(run=_prepare, kind="criteo", options=("min_count", "dense_transform", "blank", "valid", "test"))

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

    for kind in (criteo, movielens, frappe, synthetic, sequences):
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
    from embtab.datasets.schema import SPLITS, Dataset

    assert isinstance(dataset, Dataset)
    rows = ", ".join(f"{dataset.rows(split):,} {split}" for split in SPLITS)
    ids = sum(column.num_ids for column in dataset.features)
    best = f"; Bayes AUC {dataset.bayes['auc']:.4f}" if dataset.bayes else ""
    print(f"{out}: {rows} rows, {len(dataset.features)} features with {ids:,} ids{best}")


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a dataset folder")
    parser.set_defaults(run=_check_data)


def _check_data(arguments: argparse.Namespace) -> None:
    from embtab.datasets.check import check

    problems = check(arguments.dir)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{arguments.dir}: {len(problems)} problems found")
    print(f"{arguments.dir}: no problems found")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="a dataset folder")
    parser.add_argument("--method", default="dense", help="name of a method (default %(default)s)")
    parser.add_argument("--budget", help='serving bytes: 8000000, "8MB", "8MiB" or "0.1x" of the dense tables')
    parser.add_argument("--dim", type=int, default=16, help="width of every embedding (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the hashes (default %(default)s)")
    parser.add_argument("--precision", default="fp32", help="of the served rows: fp32, fp16, int8 or int4")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the method, such as op=sum; repeatable"
    )
    sharded = parser.add_argument_group("for machines one does not have")
    sharded.add_argument("--shards", type=int, metavar="N", help="also show how N devices would hold the tables")
    sharded.add_argument("--hbm", default="80GB", help="memory of a device (default %(default)s)")
    sharded.add_argument("--sharding", default="auto", help="auto, table_wise, row_wise, column_wise or data_parallel")
    sharded.add_argument(
        "--table-optimizer", default="rowwise_adagrad", help="sgd, adagrad or rowwise_adagrad (default %(default)s)"
    )
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from embtab.features import read_features
    from embtab.planning import plan

    options = dict(read_option(text) for text in arguments.option)
    features = read_features(arguments.dir)
    made = plan(
        features,
        arguments.method,
        arguments.budget,
        arguments.dim,
        arguments.seed,
        arguments.precision,
        **options,
    )
    print(made.describe())
    if arguments.shards is not None:
        from embtab.sharding.offline import describe_shards

        print(describe_shards(made, arguments.shards, arguments.hbm, arguments.sharding, arguments.table_optimizer))


def read_option(text: str) -> tuple[str, int | float | str]:
    """A method's option from "KEY=VALUE"."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--option {text!r}: write KEY=VALUE, such as op=sum")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="what to compare")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.csv and report.md; resumes")
    parser.add_argument("--data", help="a dataset folder, in place of the configuration's")
    parser.add_argument("--seeds", help="such as 0,1,2, in place of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from embtab.compare.run import compare
    from embtab.compare.sweep import read_sweep

    if arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    try:
        seeds = None if arguments.seeds is None else [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {arguments.seeds!r}: write whole numbers, such as 0,1,2") from None
    sweep = read_sweep(arguments.config, data=arguments.data, seeds=seeds)
    print(compare(sweep, arguments.out, arguments.jobs))
    print(f"{arguments.out}/report.md and {arguments.out}/results.csv", file=sys.stderr)
