"""Whole training steps: tables, ranker, loss, backward, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.bench.lookups import LR, TORCH, make_tables, read_arm
from embtab.bench.timing import Arm, Stopwatch
from embtab.bench.workload import Case, draw, numeric
from embtab.datasets.reader import Batch
from embtab.features import Feature
from embtab.fused import Optimizer
from embtab.models.autoint import AutoInt
from embtab.models.din import DIN
from embtab.planning import plan
from embtab.tables import EmbeddingCollection
from embtab.training.sequence_task import SequenceTask
from embtab.training.task import RankingTask

ITEMS, CATEGORIES = 1_000_000, 10_000
EVENTS = [
    Feature("item", ITEMS, id_space="items"),
    Feature("category", CATEGORIES, id_space="categories"),
    Feature("items", ITEMS, pooling="none", id_space="items"),
    Feature("categories", CATEGORIES, pooling="none", id_space="categories"),
]


class SparseEmbedding(nn.Module):
    """What plain torch offers: one nn.Embedding with sparse gradients for all features, one id each."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        self.table = nn.Embedding(case.num_ids, case.dim, sparse=True, device=device)
        starts = np.cumsum([0, *case.cardinalities[:-1]])
        self.register_buffer("starts", torch.from_numpy(starts).to(device).unsqueeze(1))

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        """[B, F, D]."""
        ids = batch.values().view(len(batch.keys()), -1) + self.get_buffer("starts")
        vectors: Tensor = self.table(ids)
        return vectors.transpose(0, 1)


def autoint_arms(names: Sequence[str], case: Case, budget: str, optimizer: str, device: torch.device) -> dict[str, Arm]:
    """AutoInt+ as published for Criteo, but 32 wide (3 layers, 2 heads, DNN 400-400), on each kind of tables.

    The tables of "nn.EmbeddingBag" are here one nn.Embedding under SparseAdam. A name may end in "+bf16", for the
    forward pass under autocast, as Lightning's bf16-mixed has it.
    """
    batches, arms = autoint_batches(case, device), {}
    for name in names:
        torch.manual_seed(0)
        model = AutoInt(13, len(case.features), case.dim, attention_dim=32).to(device)
        if name == TORCH:
            arms[name] = _plain_arm(SparseEmbedding(case, device), model, batches)
        else:
            tables = make_tables(name.removesuffix("+bf16"), case, budget, optimizer, device)
            task = RankingTask(tables.module, model)
            mixed = torch.autocast(device.type, torch.bfloat16, enabled=name.endswith("+bf16"))
            arms[name] = _arm(mixed(task.loss), [task.configure_optimizers()], batches)
    return arms


def autoint_batches(case: Case, device: torch.device) -> list[Batch]:
    """Criteo's features and 13 numbers, each id in a bag of `case.bag`."""
    sparse, dense = case.batches(4, device), numeric(case, 4, device)
    return [Batch(x, ids, y) for ids, (x, y) in zip(sparse, dense, strict=True)]


def _plain_arm(tables: SparseEmbedding, model: nn.Module, batches: Sequence[Batch]) -> Arm:
    def loss(batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch.dense, tables(batch.sparse)), batch.label)

    optimizers = [torch.optim.Adam(model.parameters(), 1e-3), torch.optim.SparseAdam(tables.parameters(), LR)]
    return _arm(loss, optimizers, batches)


def din_arms(
    names: Sequence[str], case: Case, budget: str, optimizer: str, device: torch.device, fill: float = 1.0
) -> dict[str, Arm]:
    """DIN (activation unit 64, head 512-128-64) on items and their categories; `case.bag` events a history.

    Args:
        names: of methods, see `read_arm`.
        case: dim, batch, length of histories, skew.
        budget: of methods that compress.
        optimizer: of the tables.
        device: where to train.
        fill: the shortest history as a share of the longest; lengths are uniform between the two.
    """
    batches, arms = din_batches(case, fill, device), {}
    for name in names:
        torch.manual_seed(0)
        chosen, backend, compiled = read_arm(name)
        planned = plan(EVENTS, chosen, None if chosen["name"] == "dense" else budget, case.dim)
        tables = EmbeddingCollection(planned, backend, Optimizer(optimizer, LR), device=device)
        if compiled:
            tables.compile_rows()
        model = DIN(0, 0, 2, case.dim, attention=(64,), hidden=(512, 128, 64), act="relu").to(device)
        task = SequenceTask(tables, model)
        arms[name] = _arm(task.loss, [task.configure_optimizers()], batches)
    return arms


def din_batches(case: Case, fill: float, device: torch.device) -> list[Batch]:
    """Targets with histories of up to `case.bag` events."""
    return [_sequences(case, fill, i, device) for i in range(4)]


def _sequences(case: Case, fill: float, seed: int, device: torch.device) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(int(case.bag * fill), case.bag + 1, case.batch)
    targets, events = (draw(rng, ITEMS, size, case.skew) for size in (case.batch, int(lengths.sum())))
    values = np.concatenate([targets, targets % CATEGORIES, events, events % CATEGORIES])
    ones = np.ones(case.batch, np.int64)
    bags = torch.from_numpy(np.concatenate([ones, ones, lengths, lengths]))
    names = [feature.name for feature in EVENTS]
    sparse = KeyedJaggedTensor(names, torch.from_numpy(values), lengths=bags).to(device)
    label = torch.from_numpy(rng.integers(0, 2, case.batch).astype(np.float32))
    return Batch(torch.empty(case.batch, 0, device=device), sparse, label.to(device))


def _arm(loss: Callable[[Batch], Tensor], optimizers: Sequence[torch.optim.Optimizer], batches: Sequence[Batch]) -> Arm:
    """Two phases: forward and loss; backward and optimizers."""

    def turn(i: int, watch: Stopwatch) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss(batches[i % len(batches)])
        watch.lap()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        watch.lap()

    return turn
