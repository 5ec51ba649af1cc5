"""The command line. Heavy imports wait until a command needs them: `embtab --help` answers at once.

A mistake of the user, or what the system refuses, is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from embtab import __version__
from embtab.commands import bench, build, bundle, compare, data, doctor, plan, search
from embtab.commands.parser import Parser
from embtab.errors import UserError, of_a_full_disk
from embtab.text import printable

TRAINING = {
    "fit": "train a ranker and its tables from a configuration (LightningCLI)",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write a checkpoint's predictions for the test split",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command."""
    given = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait make fbgemm ten times slower on a machine that is shared (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Large results in large pages: getting small ones from the system takes a quarter of a DIN step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # a hint to developers of torchrec, at its import
    try:
        if given and given[0] in TRAINING:
            from embtab.training.cli import main as train

            train(given)
        else:
            arguments = build_parser().parse_args(given)
            arguments.run(arguments)
    except UserError as error:
        _fail(" ".join(str(error).splitlines()))  # what a library says may hold line breaks
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason)
    except Exception as error:
        full = of_a_full_disk(error)
        if full is None:
            raise
        _fail(full)
    except KeyboardInterrupt:
        print("embtab: interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    """One line, and the exit code of mistakes."""
    print(printable(f"embtab: error: {message}"), file=sys.stderr)
    sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but the training ones, which are LightningCLI's."""
    parser = Parser(prog="embtab", description="Embedding tables that fit a byte budget.")
    parser.add_argument("--version", action="version", version=f"embtab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    data.add_prepare(commands.add_parser("prepare", help="turn raw files into a dataset folder of Parquet"))
    data.add_check_data(commands.add_parser("check-data", help="say what is wrong in a dataset folder, and where"))
    plan.add_plan(commands.add_parser("plan", help="show the tables that fit a byte budget"))
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    compare.add_compare(
        commands.add_parser("compare", help="compare methods at equal bytes: methods x budgets x seeds")
    )
    search.add_search(commands.add_parser("search", help="let tables learn their own shape within a byte budget"))
    bundle.add_export(commands.add_parser("export", help="write a checkpoint's tables as a bundle"))
    bundle.add_import(commands.add_parser("import", help="fit dense tables into a plan, and write a bundle"))
    bundle.add_verify(commands.add_parser("verify", help="recompute a bundle's golden vectors"))
    bundle.add_inspect(commands.add_parser("inspect", help="show what is inside a bundle"))
    bench.add_bench(commands.add_parser("bench", help="measure speed against torchrec and this machine's limits"))
    build.add_build(commands.add_parser("build", help="compile the loops in C++ ahead of their first use"))
    doctor.add_doctor(commands.add_parser("doctor", help="say what is wrong with the installation"))
    return parser
