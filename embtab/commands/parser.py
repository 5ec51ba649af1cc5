"""What every command's arguments are read with."""

from __future__ import annotations

import argparse
from typing import NoReturn

from embtab.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and points to the help."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def read_seeds(text: str | None) -> list[int] | None:
    """Seeds from "0,1,2"; None for those of the configuration."""
    try:
        return None if text is None else [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: write whole numbers, such as 0,1,2") from None
