"""Errors a user can act on. The command line prints their message on one line and exits with code 2."""

from __future__ import annotations

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
