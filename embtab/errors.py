"""Errors a user can act on. The command line prints their message on one line and exits with code 2."""


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


def shown(value: object) -> str:
    """A value as messages show it, on one line of at most some 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
