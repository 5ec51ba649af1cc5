"""Files that torch.save wrote, read as tensors and plain types alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embtab.errors import UserError


def load_plain(path: Path, refusal: str, mmap: bool = False) -> Any:
    """What a file holds, on the CPU; a pickle that names anything but tensors and plain types is refused, not run.

    Args:
        path: of a regular file; a pipe would never end.
        refusal: the message for a file that is damaged, or holds anything else.
        mmap: leave tensors on the disk until they are used.

    Raises:
        UserError: with `refusal`.
    """
    if not path.is_file():
        raise UserError(refusal)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # a damaged pickle stumbles anywhere: UnpicklingError, KeyError, AttributeError, ...
        raise UserError(refusal) from None
