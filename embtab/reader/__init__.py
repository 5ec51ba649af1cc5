"""Bundles read with NumPy alone: nothing in this package imports torch."""

from __future__ import annotations

from embtab.reader.manifest import BundleError
from embtab.reader.read import Bundle, lookup

__all__ = ["Bundle", "BundleError", "lookup"]
