"""embtab build: the compiled loops ahead of their first use, for images of machines that have no compiler."""

from __future__ import annotations

import argparse
import warnings


def add_build(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab build: none."""
    parser.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> None:
    from embtab.errors import UserError
    from embtab.lookup import native_loop
    from embtab.models import attention, dice

    for module in (native_loop, attention, dice):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loop = module.compiled_loop()
        if loop is None or said:
            raise UserError(" ".join(str(warning.message) for warning in said))
        print(f"{module.__name__}: {loop._name}")
