"""Generalised matrix factorisation on MovieLens-100k by the protocol of github.com/thomasahle/cce, on any table.

    python benchmarks/gmf_ml100k.py ML-100K --methods hash unified:chunks=4 cce:clusterings=75 lowrank:bias=true

Ratings of 3 are dropped, 4 and 5 are positive, the last two events of each user are the validation set; dim 32, AdamW
with lr 1e-3, batch 4096, 100 epochs, and the AUC of the best epoch counts, as in that library, which also clusters its
CCE after each of the first 75 and gives low rank a bias. Sizes are float32 numbers for users and movies together; here
they are a budget of four bytes each for everything that serving needs. The method "auto" chooses precisions itself.
Prints a line per method, precision and size: mean and standard deviation of the AUC over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

import embtab as et
from embtab.planning import Plan
from embtab.planning.specs import MethodSpec, read_option
from embtab.training.metrics import auc

DIM, BATCH = 32, 4096


@dataclass(frozen=True)
class Ratings:
    """Pairs of ids, both numbered by falling frequency in training, their labels, and which rows validate."""

    features: list[et.Feature]
    ids: Tensor
    labels: Tensor
    train: Tensor
    valid: Tensor


def read(raw: Path) -> Ratings:
    """Reads u.data of MovieLens-100k."""
    rows = np.loadtxt(raw / "u.data", dtype=np.int64)
    rows = rows[rows[:, 2] != 3]
    rows = rows[np.lexsort((np.arange(len(rows)), rows[:, 3], rows[:, 0]))]
    _, first, length = np.unique(rows[:, 0], return_index=True, return_counts=True)
    held = np.arange(len(rows)) >= np.repeat(first + length - 2, length)
    features, columns = [], []
    for name, values in (("user", rows[:, 0]), ("movie", rows[:, 1])):
        values = np.unique(values, return_inverse=True)[1]
        counts = np.bincount(values[~held], minlength=values.max() + 1)
        order = np.argsort(-counts, kind="stable")
        features.append(et.Feature(name, len(counts), counts=counts[order]))
        columns.append(np.argsort(order)[values])
    train, valid = (torch.from_numpy(np.flatnonzero(which)) for which in (~held, held))
    labels = torch.from_numpy((rows[:, 2] >= 4).astype(np.float32))
    return Ratings(features, torch.from_numpy(np.stack(columns)), labels, train, valid)


def best_auc(data: Ratings, plan: Plan, seed: int, epochs: int) -> float:
    """The best epoch's AUC of one run, of rows as they are served."""
    torch.manual_seed(seed)
    # The library's first rows are uniform within one over the root of dim, which has this standard deviation.
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=(3 * DIM) ** -0.5)
    optimizer = torch.optim.AdamW(tables.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    def logits(through: et.EmbeddingBagCollection, rows: Tensor) -> Tensor:
        one = torch.ones(2 * len(rows), dtype=torch.int32)
        bags = KeyedJaggedTensor(["user", "movie"], data.ids[:, rows].flatten(), lengths=one)
        users, movies = through(bags).values().split(DIM, dim=1)
        return (users * movies).sum(1)

    best, step = 0.0, 0
    for epoch in range(epochs):
        for k, rows in enumerate(data.train[torch.randperm(len(data.train))].split(BATCH)):
            tables.adapt(step, epoch if k == 0 else None)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits(tables, rows), data.labels[rows]).backward()
            optimizer.step()
            step += 1
        served = copy.deepcopy(tables).eval()
        served.round_to_served()
        with torch.no_grad():
            scores = logits(served, data.valid)
        schedule.step(F.binary_cross_entropy_with_logits(scores, data.labels[data.valid]))
        best = max(best, auc(data.labels[data.valid], scores))
    return best


def spec_of(text: str) -> MethodSpec:
    """A method from "name" or "name:option=value:option=value"."""
    name, *options = text.split(":")
    return {"name": name, **dict(map(read_option, options))} if options else name


def line(data: Ratings, method: str, precision: str | None, floats: int, seeds: list[int], epochs: int) -> str:
    """A line of the table."""
    head = f"| {method} | {precision or 'its own'} | {floats:,} |"
    found: list[float] = []
    for seed in tqdm(seeds, desc=head, leave=False):
        try:
            plan = et.plan(data.features, spec_of(method), 4 * floats, DIM, seed, precision)
        except et.InfeasibleBudget as error:
            return f"{head} infeasible: needs {error.min_bytes:,} bytes |"
        found.append(best_auc(data, plan, seed, epochs))
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{head} {statistics.mean(found):.3f}{spread} |"


def main() -> None:
    """Runs every method at every size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, help="the folder of MovieLens-100k")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["hash", "unified:chunks=4", "robe", "cce:clusterings=75", "dhe", "tt", "lowrank:bias=true"],
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = read(arguments.raw)
    print("| method | rows | floats | AUC |\n|---|---|---:|---:|")
    for method in arguments.methods:
        for precision in [None] if method == "auto" else arguments.precisions:
            for size in arguments.sizes:
                print(line(data, method, precision, size, arguments.seeds, arguments.epochs), flush=True)


if __name__ == "__main__":
    main()
