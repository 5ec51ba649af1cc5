"""What is said to a training loop that never lets adaptive methods reorganise themselves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from embtab.methods.base import Encoding

PATIENCE = 100
"""Batches in training, after which a loop that has not called `adapt` is not about to."""


class Reminder:
    """Counts batches until `adapt` is called, and warns once where it is not.

    Args:
        encodings: by id space; where none is adaptive nothing is counted.
    """

    def __init__(self, encodings: Mapping[str, Encoding]) -> None:
        self.adaptive = {space: encoding.method for space, encoding in encodings.items() if encoding.adaptive}
        self.batches = 0

    def called(self) -> None:
        """Somebody calls `adapt`."""
        self.adaptive = {}

    def trained(self) -> None:
        """A batch was computed to be trained on."""
        if not self.adaptive:
            return
        self.batches += 1
        if self.batches < PATIENCE:
            return
        space, method = next(iter(self.adaptive.items()))
        self.adaptive = {}
        warnings.warn(
            f"method {method!r} of {space!r} reorganises its tables while they train, and {PATIENCE} batches have "
            "passed without a call of adapt(): before each step call tables.adapt(step), with epoch=... before the "
            "first of an epoch; without it the tables stay as random as they began (RankingTask calls it)",
            stacklevel=4,
        )
