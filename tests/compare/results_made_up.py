"""Rows as a sweep writes them, with numbers made up, so that the report can be looked at without training."""

from typing import Any

import numpy as np

from embtab.compare.results import COLUMNS
from embtab.compare.sweep import Sweep
from embtab.datasets.schema import Categorical, Dataset, PartFile

METHODS = ("dense", "hash", "unified", {"name": "qr", "op": "concat"}, "auto")
BUDGETS = ("0.2x", "0.05x")
SEEDS = (0, 1, 2)
AUTOS = {"0.2x": "int4", "0.05x": "mixed"}
"""What precision auto chose at each budget."""
DENSE_BYTES = 1_000_000
SWEEP = Sweep("data", METHODS, BUDGETS, SEEDS, ("fp32", "int8"), dim=8)
DATASET = Dataset(
    "made-up",
    (Categorical("user", 1000), Categorical("item", 500)),
    files=(PartFile("train/0.parquet", 8000, 1, "a"), PartFile("test/0.parquet", 1000, 1, "b")),
    bayes={"auc": 0.8, "logloss": 0.4},
)


def made_up_rows(seed: int = 0) -> list[dict[str, Any]]:
    """A finished row for every cell, but one infeasible."""
    generator = np.random.default_rng(seed)
    luck = {s: generator.normal(0, 0.003) for s in SEEDS}  # of a seed, whatever the method
    noise = generator.normal(0, 0.002, 200)  # of a resample, whatever the method
    rows = []
    for cell in SWEEP.cells():
        method = cell.method if isinstance(cell.method, str) else "qr op=concat"
        precision = cell.precision or AUTOS[str(cell.budget)]
        share = 1.0 if cell.budget is None else float(str(cell.budget)[:-1])
        share *= 0.4 if method == "dense" and precision == "int8" else 1
        loss = {"dense": 0, "hash": 0.05, "unified": 0.004, "qr op=concat": 0.01, "auto": 0.006}[method]
        auc = 0.75 + luck[cell.seed] - loss * (1 - np.log10(share)) + generator.normal(0, 0.0005)
        nbytes = int(share * DENSE_BYTES)
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"method": method, "budget": cell.budget or "none", "precision": precision, "seed": cell.seed}
        row |= {
            "dense_nbytes": DENSE_BYTES,
            "dim": 8,
            "dataset": "made-up",
            "fingerprint": "f",
            "versions": {"embtab": "0"},
        }
        row |= {"training": {**SWEEP.training}, "budget_bytes": None if cell.budget is None else nbytes}
        if method == "qr op=concat" and cell.budget == "0.05x":
            rows.append(row | {"key": f"infeasible {cell.name}", "status": "infeasible", "min_bytes": 60_000})
            continue
        row |= {"key": cell.name, "status": "ok", "nbytes": nbytes, "auc": auc, "val_auc": auc + 0.001}
        row |= {"logloss": 1 - auc, "ne": 1.5 - auc, "calibration": 1 + loss, "epochs": 1, "seconds": 3.0}
        row |= {"samples_per_s": 1e5 * (1 - loss), "latency_us": 1 + loss}
        row |= {"bytes_by_part": {"user": nbytes - 1000, "item@remainder": 1000}}
        row |= {"auc_resampled": (auc + noise + generator.normal(0, 0.0002, 200)).tolist()}
        row |= {"deciles": [[d / 10, d / 10 + loss / 10, 100] for d in range(10)]}
        row |= {"collisions": {"user": [int(2000 * loss), 1000], "item": [0, 500]}}
        quality = {"rows": 300, "auc": auc - 0.01, "logloss": 0.5}
        row |= {
            "slices": {"unseen": quality, "rare": quality | {"up_to": 4.0}, "frequent": quality | {"auc": auc + 0.01}}
        }
        rows.append(row)
    return rows
