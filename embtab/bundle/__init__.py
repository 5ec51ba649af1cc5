"""Bundles: trained tables as a folder that any ranker can read. docs/bundle.md is the contract."""

from __future__ import annotations

from embtab.bundle.loader import load
from embtab.bundle.writer import save

__all__ = ["load", "save"]
