"""What Lightning, jsonargparse and torch say of the user's settings, as one line: they raise all kinds of errors."""

from __future__ import annotations

import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_PACKAGES = ("lightning", "jsonargparse")
_MOST = 270  # characters; Lightning goes on with its documentation
_STATE = "Error(s) in loading state_dict"


def said_of_settings(error: BaseException) -> str | None:
    """The line for an error that comes of a setting or a checkpoint; None for one that is a fault of the code.

    What Lightning or jsonargparse raise themselves (and not what they call) is about settings.
    """
    if str(error).startswith(_STATE):
        return f"the checkpoint does not fit this configuration: {_first_difference(error)}; give the one of its run"
    about_settings = isinstance(error, ArgumentError | MisconfigurationException) or (
        isinstance(error, ValueError | TypeError | RuntimeError | ImportError)
        and _raised_by(error).split(".")[0] in _PACKAGES
    )
    if not about_settings:
        return None
    causes = list(_chain(error))
    absent = next((each for each in causes if isinstance(each, ModuleNotFoundError)), None)
    if absent is not None:
        return f"{one_line(absent)}; install the package, or leave out what needs it"
    return one_line(next((each for each in causes if isinstance(each, MisconfigurationException)), error))


def one_line(error: BaseException) -> str:
    """The message without what it says about Python types and whole settings that hold the wrong one."""
    text = " ".join(str(error).split())
    text = re.sub(r"Type \S*Callable\[.*\] expects a function or a callable class: ", "", text)
    text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_by(error: BaseException) -> str:
    """The module whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _first_difference(error: BaseException) -> str:
    """The first of the lines in which torch lists what is missing, unexpected or of another shape."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    said = (lines or ["other tensors"])[0].rstrip(".")
    return said if len(said) <= 160 else f"{said[:157]}..."
