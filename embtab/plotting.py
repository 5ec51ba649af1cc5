"""Pictures by matplotlib, for those who installed it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from embtab.errors import UserError
from embtab.files import replaced_file


def pyplot() -> ModuleType:
    """matplotlib.pyplot, which draws to files only.

    Raises:
        UserError: where matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("a plot needs matplotlib; install it with: pip install 'embtab[plot]'") from None
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG in one step, and lets go of the figure."""
    with replaced_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
    pyplot().close(figure)
