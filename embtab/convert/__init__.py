"""Dense tables of any origin, into any plan: read safely, fitted, tuned, and what was lost is said."""

from __future__ import annotations

from embtab.convert.dense import from_dense

__all__ = ["from_dense"]
