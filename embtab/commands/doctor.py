"""embtab doctor: what is wrong with the installation, in words."""

from __future__ import annotations

import argparse
import sys

MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab doctor: none."""
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from embtab.commands.examine import examine

    states = []
    for finding in examine():
        print(f"{MARKS[finding.state]}  {finding.name}: {finding.text}", flush=True)
        states.append(finding.state)
    if "broken" in states:
        print("embtab doctor: something is broken, see above", file=sys.stderr)
        sys.exit(1)
