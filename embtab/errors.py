"""Errors a user can act on. The command line prints their message on one line and exits with code 2."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong: the message says what, where, and how to mend it."""


class DataError(UserError):
    """A data file is wrong: the message names the file, and the row or column where one is known."""


class InfeasibleBudget(UserError):
    """No table of the asked kind fits into the byte budget.

    Attributes:
        min_bytes: the smallest budget, in bytes, for which the same request can be met.
    """

    def __init__(self, message: str, min_bytes: int) -> None:
        super().__init__(message)
        self.min_bytes = min_bytes


def listed(names: Iterable[str]) -> str:
    """Names as messages list them, cut after some 300 characters."""
    text = ", ".join(names)
    return text if len(text) <= 300 else f"{text[:297]}..."


def shown(value: object) -> str:
    """A value as messages show it, on one line of at most some 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def of_a_full_disk(error: BaseException | None) -> str | None:
    """What the system said where an error, or one that led to it, comes of a disk or quota that is full; else None."""
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors and polars pass it on
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
