"""embtab search: tables that learn their own shape."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from embtab.commands.parser import read_seeds
from embtab.errors import UserError


def add_search(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab search."""
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="methods, budgets, seeds, training")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder per search; resumes")
    parser.add_argument("--data", help="a dataset folder, in place of the configuration's")
    parser.add_argument("--seeds", help="such as 0,1,2, in place of the configuration's")
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    from embtab.compare.search_grid import search
    from embtab.compare.sweep import read_sweep

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("embtab search trains in one process: start it without torchrun")
    sweep = read_sweep(arguments.config, data=arguments.data, seeds=read_seeds(arguments.seeds))
    print(search(sweep, arguments.out), end="")
    print(f"{arguments.out}/report.md and {arguments.out}/results.csv", file=sys.stderr)
