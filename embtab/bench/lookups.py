"""Embedding tables alone: forward, and forward + backward + update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchrec
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.bench.timing import Arm, Stopwatch
from embtab.bench.workload import Case
from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.planning import plan
from embtab.planning.specs import read_option
from embtab.tables import EmbeddingBagCollection

LR = 0.01
TORCHREC, TORCH = "torchrec", "nn.EmbeddingBag"
DENSE_ARMS = (TORCHREC, TORCH, "dense")
MAX_THREADS = 1024


@dataclass
class Tables:
    """Tables under test.

    Args:
        forward: batch -> vectors [B, F * D].
        update: what follows backward, where an optimizer is outside.
        module: for whole rankers.
        parameters: those an outer optimizer updates sparsely.
    """

    forward: Callable[[KeyedJaggedTensor], Tensor]
    update: Callable[[], None]
    module: nn.Module


def make_tables(
    name: str, case: Case, budget: str, optimizer: str, device: torch.device, precision: str | None = None
) -> Tables:
    """Tables by name: "torchrec", "nn.EmbeddingBag", or a method of ours: "qr", "qr:op=sum", "hash@native+compiled".

    Args:
        name: of the arm.
        case: features and dim.
        budget: of a method that compresses.
        optimizer: fused into backward; outside, for nn.EmbeddingBag, SGD takes its place.
        device: where the tables live.
        precision: of a method's rows in serving; None for fp32, and for what "auto" chooses.

    Raises:
        UserError: for a name that says none of these.
    """
    if name == TORCHREC:
        return _torchrec(case, optimizer, device)
    if name == TORCH:
        return _torch(case, device)
    chosen, backend, compiled = read_arm(name)
    limit = None if chosen["name"] == "dense" else budget
    planned = plan(case.features, chosen, limit, case.dim, precision=precision)
    tables = EmbeddingBagCollection(planned, backend, Optimizer(optimizer, LR), device=device)
    if compiled:
        tables.compile_rows()
    return Tables(lambda batch: tables(batch).values(), _nothing, tables)


def read_arm(arm: str) -> tuple[dict[str, Any], str, bool]:
    """A method of ours with its options, its backend, and whether its rows are compiled.

    Raises:
        UserError: for an arm that says something else.
    """
    name, _, compiled = arm.partition("+")
    name, _, backend = name.partition("@")
    if compiled not in ("", "compiled") or backend not in ("", "native", "fbgemm"):
        raise UserError(f"arm {arm}: a method may be followed by @native or @fbgemm, and then +compiled, only")
    method, _, options = name.partition(":")
    chosen = {"name": method} | dict(read_option(option) for option in options.split(",") if option)
    return chosen, backend or "fbgemm", bool(compiled)


def _nothing() -> None:
    return None


def _torchrec(case: Case, optimizer: str, device: torch.device) -> Tables:
    """One dense table a feature in torchrec's own fused collection."""
    kinds = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    }
    configs = [
        EmbeddingBagConfig(name=f.name, embedding_dim=case.dim, num_embeddings=f.num_ids, feature_names=[f.name])
        for f in case.features
    ]
    tables = FusedEmbeddingBagCollection(
        tables=configs, optimizer_type=kinds[optimizer], optimizer_kwargs={"lr": LR}, device=device
    )
    return Tables(lambda batch: tables(batch).values(), _nothing, tables)


def _torch(case: Case, device: torch.device) -> Tables:
    """One nn.EmbeddingBag a feature, sparse gradients, SGD."""
    bags = nn.ModuleList(
        nn.EmbeddingBag(n, case.dim, mode="sum", sparse=True, include_last_offset=True, device=device)
        for n in case.cardinalities
    )
    optimizer = torch.optim.SGD(bags.parameters(), LR)

    def forward(batch: KeyedJaggedTensor) -> Tensor:
        features = batch.to_dict().values()
        return torch.cat([bag(f.values(), f.offsets()) for bag, f in zip(bags, features, strict=True)], dim=1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Tables(forward, update, bags)


def lookup_arms(names: Sequence[str], case: Case, budget: str, optimizer: str, device: torch.device) -> dict[str, Arm]:
    """Each kind of tables with two phases: forward; backward and update. "hash@native/2": with two threads.

    Raises:
        UserError: for a name that says none of these.
    """
    batches = case.batches(6, device)
    gradient = 1e-3 * torch.randn(case.batch, len(case.features) * case.dim, device=device)

    def arm(name: str) -> Arm:
        name, threads = _read_threads(name)
        tables = make_tables(name, case, budget, optimizer, device)

        def turn(i: int, watch: Stopwatch) -> None:
            torch.set_num_threads(threads)
            watch.restart()
            vectors = tables.forward(batches[i % len(batches)])
            watch.lap()
            vectors.backward(gradient)
            tables.update()
            watch.lap()

        return turn

    return {name: arm(name) for name in names}


def _read_threads(arm: str) -> tuple[str, int]:
    name, slash, threads = arm.partition("/")
    if not slash:
        return name, torch.get_num_threads()
    if not threads.isdecimal() or not 1 <= int(threads) <= MAX_THREADS:
        raise UserError(f"arm {arm}: after / stands a number of threads, 1 to {MAX_THREADS}, as in dense@native/2")
    return name, int(threads)
