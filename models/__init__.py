"""Rankers: plain modules that receive embeddings and know no compression method, lookup backend or trainer."""

from embtab.models.autoint import AutoInt

__all__ = ["AutoInt"]
