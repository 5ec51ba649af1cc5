"""Tables as a module: ids of a batch in, vectors out."""

from __future__ import annotations

from embtab.tables.collections import EmbeddingBagCollection, EmbeddingCollection

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]
