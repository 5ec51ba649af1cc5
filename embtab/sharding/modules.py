"""Torchrec's collections for a plan's tables, before they are spread: no memory, no processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embtab.errors import UserError
from embtab.lookup.base import padded
from embtab.methods.storage import Table
from embtab.sharding.placement import Kinds, codes


def torchrec_modules(
    tables: Sequence[Table], kinds: Kinds, bags: Mapping[str, str], ids: Mapping[str, str]
) -> nn.ModuleDict:
    """The torchrec collections that answer some slots, without memory (on the meta device).

    Args:
        tables: the physical tables.
        kinds: those that every process holds in full are left out.
        bags: the table of every slot that is summed over bags.
        ids: the table of every slot that is read id by id.
    """
    moved = {name: table for name, table in bags.items() if kinds[table] == "row_wise_ids"}
    bags, ids = {name: table for name, table in bags.items() if name not in moved}, {**ids, **moved}
    both = set(bags.values()) & set(ids.values())
    if both:
        raise UserError(f"table {min(both)!r} is read both by bag and by id; spread it by row_wise_ids")
    spread = {code: table for table, code in zip(tables, codes(tables).values(), strict=True)
              if kinds[table.name] != "data_parallel"}  # fmt: skip
    meta = torch.device("meta")
    modules: dict[str, nn.Module] = {}
    pooled = list(_configs(EmbeddingBagConfig, spread, bags))
    single = list(_configs(EmbeddingConfig, spread, ids))
    for name in dict.fromkeys(bags_of(spread[config.name].width) for config in pooled):
        same = [config for config in pooled if bags_of(spread[config.name].width) == name]
        modules[name] = EmbeddingBagCollection(tables=same, device=meta)
    for name in dict.fromkeys(ids_of(spread[config.name].width) for config in single):
        same = [config for config in single if ids_of(spread[config.name].width) == name]
        modules[name] = EmbeddingCollection(tables=same, device=meta)
    return nn.ModuleDict(modules)


def bags_of(width: int) -> str:
    """The collection that sums rows of this width: padded ones have a collection, and a learning rate, of their own."""
    return "bags" if width == padded(width) else f"bags{width}"


def ids_of(width: int) -> str:
    """The collection that reads rows of this width one by one."""
    return f"ids{width}"


def _configs(kind: type, tables: Mapping[str, Table], slots: Mapping[str, str]) -> Iterator[Any]:
    for code, table in tables.items():
        names = [name for name, read in slots.items() if read == table.name]
        if names:
            yield kind(
                name=code,
                num_embeddings=table.num_rows,
                embedding_dim=padded(table.width),
                feature_names=names,
            )
