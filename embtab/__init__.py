"""Embedding tables that fit a byte budget: plan, train, compare and hand over.

```python
import embtab as et
from embtab.reader import Bundle

features = [et.Feature("user", 6040), et.Feature("film", 3706, pooling="mean")]
plan = et.plan(features, method="unified", budget="200kB", dim=16)
tables = et.EmbeddingBagCollection(plan)  # to train, inside any model

et.save(tables, "bundle")
bundle = Bundle("bundle")  # reads with NumPy alone
vectors = bundle.lookup("user", [3, 14, 15])
```

The names of this page are what most programs need. What lies behind them:

- `embtab.methods`: a file for each method: its paper, its equations, and what differs from the paper.
- `embtab.models`: AutoInt, DIN, DARE and MeanPool, which receive embeddings and know nothing of tables.
- `embtab.datasets`: raw files to a dataset folder, and its batches.
- `embtab.training`: Lightning's task, data, metrics and checkpoints.
- `embtab.sharding`: tables spread over processes.
- `embtab.learned`: tables that learn their own shape, as `embtab search` does.
- `embtab.bundle`, `embtab.reader`: tables as files, and how NumPy alone decodes them.
- `embtab.convert.dense`: dense tables of any origin, into a plan.
- `embtab.reader.delta`, `embtab.bundle.materialise`, `embtab.serving`: bundles as differences, plain vectors, programs.
- `embtab.errors`: what may be raised.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embtab.bundle import load, save
    from embtab.convert import from_dense
    from embtab.errors import InfeasibleBudget
    from embtab.features import Feature, read_features
    from embtab.fused import FusedOptimizer, Optimizer, outer_parameters, with_tables
    from embtab.methods import METHODS, list_methods
    from embtab.planning import Plan, plan
    from embtab.sharding.strategy import TorchRecStrategy
    from embtab.tables import EmbeddingBagCollection, EmbeddingCollection
    from embtab.training.contract import TableContract
    from embtab.training.data import DataModule
    from embtab.training.task import RankingTask

# torch, torchrec and Lightning take seconds to import; each name brings what it needs when it is first used.
_HOMES = {
    "DataModule": "embtab.training.data",
    "EmbeddingBagCollection": "embtab.tables.collections",
    "EmbeddingCollection": "embtab.tables.collections",
    "Feature": "embtab.features",
    "InfeasibleBudget": "embtab.errors",
    "METHODS": "embtab.methods",
    "FusedOptimizer": "embtab.fused",
    "Optimizer": "embtab.fused",
    "Plan": "embtab.planning",
    "RankingTask": "embtab.training.task",
    "TableContract": "embtab.training.contract",
    "TorchRecStrategy": "embtab.sharding.strategy",
    "from_dense": "embtab.convert.dense",
    "list_methods": "embtab.methods",
    "load": "embtab.bundle",
    "outer_parameters": "embtab.fused",
    "plan": "embtab.planning",
    "read_features": "embtab.features",
    "save": "embtab.bundle",
    "with_tables": "embtab.fused",
}

__all__ = [
    "METHODS",
    "DataModule",
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "Feature",
    "FusedOptimizer",
    "InfeasibleBudget",
    "Optimizer",
    "Plan",
    "RankingTask",
    "TableContract",
    "TorchRecStrategy",
    "from_dense",
    "list_methods",
    "load",
    "outer_parameters",
    "plan",
    "read_features",
    "save",
    "with_tables",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embtab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    if "lightning.pytorch.strategies" in sys.modules:  # then Trainer(strategy="torchrec") may come
        importlib.import_module("embtab.training.strategies").register()
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
