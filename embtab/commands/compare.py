"""embtab compare: methods at equal bytes."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from embtab.commands.parser import read_seeds
from embtab.errors import UserError


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab compare."""
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="what to compare")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the report and results.csv; resumes")
    parser.add_argument("--data", help="a dataset folder, in place of the configuration's")
    parser.add_argument("--seeds", help="such as 0,1,2, in place of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from embtab.sequences.study import is_study

    if arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    run = _sequences if is_study(arguments.config) else _features
    run(arguments, read_seeds(arguments.seeds))


def _features(arguments: argparse.Namespace, seeds: list[int] | None) -> None:
    for package in ("altair", "jinja2", "vl_convert"):  # hours of training end in a page that needs them
        if find_spec(package) is None:
            raise UserError(f'the report needs {package}, which is not installed: pip install "embtab[report]"')
    from embtab.compare.report import brief
    from embtab.compare.run import compare
    from embtab.compare.sweep import read_sweep

    report = compare(read_sweep(arguments.config, data=arguments.data, seeds=seeds), arguments.out, arguments.jobs)
    print(brief(report))
    print(f"report: {arguments.out}/report.html (and report.md, results.csv, results.parquet)", file=sys.stderr)


def _sequences(arguments: argparse.Namespace, seeds: list[int] | None) -> None:
    from embtab.sequences.run import run_study
    from embtab.sequences.study import read_study

    if arguments.jobs > 1:
        raise UserError("--jobs: sequence models are trained one after the other; leave it out")
    print(run_study(read_study(arguments.config, data=arguments.data, seeds=seeds), arguments.out))
    print(f"report: {arguments.out}/report.md (and results.csv, auc.png)", file=sys.stderr)
