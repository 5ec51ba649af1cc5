"""What the processes of the tests run: small training runs under TorchRecStrategy. No test itself."""

from __future__ import annotations

import os
import resource
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from laws import CASES, DIM, FEATURES, Bags, Case
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.sharding import checkpoint as folders
from embtab.sharding.placement import KINDS
from embtab.sharding.processes import first_says
from embtab.sharding.strategy import gathered, shard
from embtab.sharding.traffic import measured

BAGS = 4  # of every batch, over all processes
STEPS = 6
# A product doubles the digits of its factors: after more steps not all fit a float. Adagrad's first step leaves nothing
# short; its second would divide a gradient that cancels, which is rounding then, by itself.
EXACT_STEPS = {"sgd": 2, "adagrad": 1, "rowwise_adagrad": 1}
TABLE_LR = 0.05
# Those of the laws never get as far as reorganising themselves in so few steps.
SOON = [Case("cafe soon", {"name": "cafe", "every": 2}), Case("cce soon", {"name": "cce", "every": 2})]
ALL = [*CASES, *SOON]
RESUMED = next(case for case in CASES if case.name == "mixed")


class Learner(L.LightningModule):
    """Tables and a linear head; keeps the losses of all bags."""

    def __init__(self, tables: Any, lr: float = 0.1):
        super().__init__()
        torch.manual_seed(7)
        self.tables, self.lr = tables, lr
        self.head = torch.nn.Linear(len(FEATURES) * DIM, 1)
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.adapted: list[str] = []

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.adapted += self.tables.adapt(self.global_step)

    def loss(self, batch: Any) -> torch.Tensor:
        bags, label = batch
        pooled = self.tables(bags)
        vectors = torch.cat([pooled[feature.name] for feature in FEATURES], 1)
        return F.binary_cross_entropy_with_logits(self.head(vectors).squeeze(1), label)

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(float(self.loss(batch)))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.losses.append(float(mean))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def learner(case: Case, optimizer: str, seed: int = 0) -> Learner:
    tables = et.EmbeddingBagCollection(case.plan(), optimizer=et.Optimizer(optimizer, TABLE_LR))
    torch.manual_seed(seed)  # only now: what is imported on the way may draw numbers
    tables.init(0.3)
    return Learner(tables)


class Scheduled(Learner):
    """The same, whose learning rates, those of the tables too, fall to a tenth every second step."""

    def configure_optimizers(self) -> Any:
        optimizer = et.with_tables(torch.optim.SGD(et.outer_parameters(self), lr=self.lr), self)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def set_up(case: Case, optimizer: str, how: str) -> Learner:
    """A module whose tables are scheduled, frozen, or given a learning rate before training."""
    module = learner(case, optimizer)
    if how == "scheduled":
        module = Scheduled(module.tables)
        torch.nn.init.constant_(module.head.weight, 0.1)
    elif how == "frozen":
        module.tables.requires_grad_(False)
    else:
        module.tables.set_learning_rate(TABLE_LR / 4)
    return module


def run_set_up(rank: int, world_size: int, port: int, folder: str, runs: list[tuple[str, str, str, str]]) -> None:
    """Trains every (case, optimizer, sharding plan, how); rank 0 writes losses and tables."""
    enter(rank, world_size, port)
    found = {}
    for name, optimizer, plan, how in runs:
        module = set_up(next(case for case in ALL if case.name == name), optimizer, how)
        fit(module, slice(None), strategy(plan), world_size)
        found[name, optimizer, plan, how] = module.losses, gathered(module.tables).lookup.state_dict()
    if rank == 0:
        torch.save(found, Path(folder) / "set_up.pt")


class Exact(Learner):
    """The same where no sum is ever rounded: every number is a small multiple of a power of two, and the loss is linear
    in the scores. Whatever differs from one process to many, but for the order of additions, shows in full.
    """

    def loss(self, batch: Any) -> torch.Tensor:
        bags, label = batch
        pooled = self.tables(bags)
        scores = self.head(torch.cat([pooled[feature.name] for feature in FEATURES], 1)).squeeze(1)
        return torch.where(label > 0, -scores, scores).mean()


def exact(case: Case, optimizer: str) -> Exact:
    tables = et.EmbeddingBagCollection(case.plan(), optimizer=et.Optimizer(optimizer, lr=1.0))
    module = Exact(tables, lr=1.0)
    torch.manual_seed(0)
    trained = [tables.lookup.table(name) for name in tables.lookup.tables]
    for values in [*trained, *(each.detach() for each in module.parameters())]:
        values.copy_(torch.randint(-1, 2, values.shape))
    return module


def batches(rank: int, world_size: int, exact: bool = False) -> list[tuple[Any, torch.Tensor]]:
    """This process's share of the same bags, ragged, with empty ones and repeated ids.

    With `exact`, weights are multiples of a half and lengths are powers of two, which means are divided by.
    """
    random = np.random.default_rng(3)
    low, high = rank * BAGS // world_size, (rank + 1) * BAGS // world_size
    made = []
    for step in range(STEPS):
        content = {
            f.name: [
                [
                    (int(i), float(w))
                    for i, w in zip(random.integers(0, f.num_ids, n), weights(random, n, exact), strict=True)
                ]
                for n in ((2, 0, 2, 1) if exact else (2, 0, 3, 1))
            ]
            for f in FEATURES
        }
        mine = Bags({name: bags[low:high] for name, bags in content.items()})
        made.append((mine.kjt(weighted=step % 2 == 1), torch.tensor([1.0, 0.0, 0.0, 1.0])[low:high]))
    return made


def weights(random: np.random.Generator, size: int, exact: bool) -> np.ndarray:
    return random.integers(1, 4, size) / 2 if exact else random.random(size)


def fit(
    module: Learner,
    steps: slice,
    strategy: Any = "auto",
    world_size: int = 1,
    epochs: int = 1,
    validate: bool = False,
    accelerator: str = "cpu",
    **options: Any,
):
    """Trains on some steps; validates on the same, in the middle of an epoch and at its end, where asked to."""
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=world_size,
        strategy=strategy,
        max_epochs=epochs,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        limit_val_batches=1.0 if validate else 0,
        val_check_interval=STEPS // 2 if validate else None,
        **quiet,
    )
    content = batches(rank, world_size, isinstance(module, Exact))[steps]
    loader = torch.utils.data.DataLoader(content, batch_size=None, collate_fn=lambda x: x)
    trainer.fit(module, loader, loader if validate else None, **options)
    return trainer


def alone(case: Case, optimizer: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run in this process, by Lightning's own strategy and the fbgemm backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = learner(case, optimizer)
        fit(module, slice(None))
    return module.losses, module.tables.state_dict()


def enter(rank: int, world_size: int, port: int) -> None:
    """What torchrun does for its processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def strategy(plan: Any, pipeline: bool = False, backend: str = "gloo") -> et.TorchRecStrategy:
    return et.TorchRecStrategy(plan, pipeline, process_group_backend=backend)


def run_cases(rank: int, world_size: int, port: int, folder: str, runs: list[tuple[str, str, Any]]) -> None:
    """Trains every (case, optimizer, sharding plan); rank 0 writes losses and tables."""
    enter(rank, world_size, port)
    found = {}
    for name, optimizer, plan in runs:
        case = next(case for case in ALL if case.name == name)
        module = learner(case, optimizer)
        fit(module, slice(None), strategy(plan), world_size)
        assert module.adapted or case not in SOON
        found[name, optimizer, str(plan)] = module.losses, gathered(module.tables).state_dict()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


def run_exact(rank: int, world_size: int, port: int, folder: str, runs: list[tuple[str, str, Any]]) -> None:
    """Trains every (case, optimizer, sharding plan) without rounding; rank 0 writes losses and tables."""
    enter(rank, world_size, port)
    found = {}
    for name, optimizer, plan in runs:
        module = exact(next(case for case in ALL if case.name == name), optimizer)
        fit(module, slice(0, EXACT_STEPS[optimizer]), strategy(plan), world_size)
        found[name, optimizer, str(plan)] = module.losses, gathered(module.tables).state_dict()
    if rank == 0:
        torch.save(found, Path(folder) / "exact.pt")


def exact_alone(case: Case, optimizer: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run in this process, by Lightning's own strategy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = exact(case, optimizer)
        fit(module, slice(0, EXACT_STEPS[optimizer]))
    return module.losses, module.tables.state_dict()


def bundle(tables: Any, folder: Path, patch: pytest.MonkeyPatch, precision: str | None = None) -> dict[str, bytes]:
    """The bytes of every file of the tables' bundle, made at noon."""

    class Noon(datetime):
        @classmethod
        def now(cls, *_: Any) -> Noon:
            return cls(2026, 1, 1, 12)

    patch.setattr("embtab.bundle.writer.datetime", Noon)
    et.save(tables, folder, precision=precision)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_pipelined(
    rank: int, world_size: int, port: int, folder: str, runs: list[tuple[str, str, Any]], gpu: bool = False
) -> None:
    """Trains every (case, optimizer, sharding plan), for two epochs with validation, with a pipeline and without; rank
    0 writes losses, tables, and what happened in which order.
    """
    enter(rank, world_size, port)
    where, backend = ("gpu", "nccl") if gpu else ("cpu", "gloo")
    found = {}
    for name, optimizer, plan in runs:
        for pipeline in (False, True):
            module = learner(next(case for case in ALL if case.name == name), optimizer)
            with order_of_sending() as order:
                chosen = strategy(plan, pipeline, backend)
                fit(module, slice(None), chosen, world_size, epochs=2, validate=True, accelerator=where)
            tables = gathered(module.tables).state_dict()
            found[name, pipeline] = module.losses, module.validated, tables, order
    if rank == 0:
        torch.save(found, Path(folder) / "pipelined.pt")


@contextmanager
def order_of_sending() -> Iterator[list[str]]:
    """Notes when ids leave this process, and when tables are read; both happen inside torchrec."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection):
            for name in ("input_dist", "compute_and_output_dist"):
                patch.setattr(kind, name, noting(seen, name, getattr(kind, name)))
        yield seen


def noting(seen: list[str], name: str, act: Any) -> Any:
    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(name)
        return act(*arguments, **options)

    return noted


def resume_cases(rank: int, world_size: int, port: int, folder: str, plan: str, stop: bool) -> None:
    """Trains to the middle and writes a checkpoint, or goes on from it; rank 0 writes losses and tables."""
    enter(rank, world_size, port)
    for optimizer in ("adagrad", "rowwise_adagrad"):
        path = Path(folder) / f"{optimizer}.ckpt"
        module = learner(RESUMED, optimizer, seed=0 if stop else 1)
        if stop:
            fit(module, slice(0, 3), strategy(plan), world_size).save_checkpoint(path)
            continue
        fit(module, slice(3, None), strategy(plan), world_size, epochs=2, ckpt_path=path, weights_only=True)
        tables = gathered(module.tables).state_dict()
        if rank == 0:
            torch.save((module.losses, tables), Path(folder) / f"{optimizer}.{world_size}.pt")


def refusals(rank: int, world_size: int, port: int, folder: str) -> None:
    """What must fail on every rank, and what must not change; each rank writes what it saw."""
    enter(rank, world_size, port)
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {}

    def attempt(name: str, act: Any) -> None:
        try:
            act()
        except UserError as error:
            seen[name] = str(error)

    tables = learner(ALL[0], "sgd").tables
    before = {name: value.clone() for name, value in tables.state_dict().items()}
    shard(tables, {"items": "row_wise", "shop": "data_parallel", "*": "table_wise"}, torch.device("cpu"))
    after = gathered(tables).state_dict()
    seen["kept"] = all(torch.equal(before[name], after[name]) for name in before)
    batch, _ = batches(rank, world_size)[1]
    with torch.no_grad():
        alone, together = learner(ALL[0], "sgd").tables(batch), tables(batch)
    seen["answer"] = max(float((alone[f.name] - together[f.name]).abs().max()) for f in FEATURES)
    seen["order"] = [list(keys) for keys in orders(tables, batch)]
    batch = KeyedJaggedTensor(
        batch.keys(), batch.values(), lengths=batch.lengths(), weights=batch.weights().requires_grad_()
    )
    attempt("weights", lambda: tables(batch))
    seen["weights"] += " but by id they do" if weights_learn(batch) else ""
    seen["table"] = {kind: served_apart(kind) for kind in KINDS}
    attempt("first", lambda: first_says(lambda: 1 // 0))
    attempt("columns", lambda: shard(learner(ALL[0], "rowwise_adagrad").tables, "column_wise", torch.device("cpu")))
    drawn = et.EmbeddingBagCollection(RESUMED.plan(), optimizer=et.Optimizer("sgd"))
    drawn.init(0.3, seed=9)
    for plan in ("row_wise", "table_wise", "column_wise", "data_parallel"):
        unmade = et.EmbeddingBagCollection(RESUMED.plan(), optimizer=et.Optimizer("sgd"), device="meta")
        attempt("unmade", lambda unmade=unmade: unmade(batch))
        unmade.init(0.3, seed=9 + rank)  # that of rank 0 counts
        shard(unmade, plan, torch.device("cpu"))
        values = gathered(unmade).lookup.state_dict()
        seen[f"drawn {plan}"] = all(torch.equal(values[key], value) for key, value in drawn.lookup.state_dict().items())
    seen["peak"] = peak_of_a_large_table()
    seen["sent"] = {
        (kind, pooled): measured(kind, 3, 16, 2, 6, 64, pooled) for kind in KINDS for pooled in (True, False)
    }
    broken = et.EmbeddingBagCollection(SOON[0].plan())
    shard(broken, "row_wise", torch.device("cpu"))
    if rank == 0:
        et.METHODS["cafe"].adapt = lambda *_: 1 // 0
    attempt("adapt", lambda: broken.adapt(2))
    task = et.RankingTask(broken, torch.nn.Identity())
    spoilt, table = next(each for each in task.state_dict().items() if hasattr(each[1], "local_shards"))
    if rank == 1:
        table.local_shards()[0].tensor[-1, -1] = float("nan")
    attempt("spoilt", lambda: task.on_save_checkpoint({"state_dict": task.state_dict()}))
    seen["spoilt"] = seen["spoilt"].replace(spoilt, "it")
    outer = et.EmbeddingBagCollection(ALL[0].plan(), backend="torch")
    attempt("torch", lambda: shard(outer, "auto", torch.device("cpu")))
    target = Path(folder) / "whole"
    folders.save(target, {"x": torch.ones(3)}, {"step": 1})
    attempt("unwritten", lambda: folders.save(target, {"x": torch.zeros(3)}, {"step": lambda: None}))
    seen["survives"] = folders.read_meta(target)["step"] == 1 and bool((folders.read_whole(target)["x"] == 1).all())
    torch.save(seen, Path(folder) / f"seen{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def orders(tables: Any, batch: KeyedJaggedTensor) -> tuple[list[str], list[str]]:
    """What torchrec's collection is asked for, and what it answers: the plan of the tables decides upon the order."""
    bags = tables.lookup.collections["bags"]
    asked = [slot for slot in tables.lookup.table_of if tables.lookup.table_of[slot] not in tables.lookup.replicated]
    sizes = [len(batch[slot.split("@")[0]].values()) for slot in asked]
    rows = torch.zeros(sum(sizes), dtype=torch.int64)
    lengths = torch.cat([batch[slot.split("@")[0]].lengths() for slot in asked])
    return asked, bags(KeyedJaggedTensor(asked, rows, lengths=lengths)).wait().keys()


def served_apart(kind: str) -> float:
    """How far rows that are rounded where they are spread lie from those of a table in one piece."""
    plan = et.plan([et.Feature("items", 101), et.Feature("shop", 33)], "dense", dim=6, precision="int4")
    one, spread = (et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("sgd")) for _ in range(2))
    for each in (one, spread):
        each.init(0.3, seed=5)
    shard(spread, kind, torch.device("cpu"))
    one.round_to_served()
    spread.round_to_served()
    rounded = gathered(spread).lookup
    return max(float((one.lookup.table(name) - rounded.table(name)).abs().max()) for name in plan.tables)


def weights_learn(batch: KeyedJaggedTensor) -> bool:
    """Whether weights of a batch get their gradient from tables whose rows travel by id."""
    found = []
    for spread in (False, True):
        tables = learner(ALL[0], "sgd").tables
        if spread:
            shard(tables, "row_wise_ids", torch.device("cpu"))
        tables.per_process = not spread
        weights = batch.weights().detach().clone().requires_grad_()
        asked = KeyedJaggedTensor(batch.keys(), batch.values(), lengths=batch.lengths(), weights=weights)
        tables(asked).values().square().sum().backward()
        found.append(weights.grad)
    return torch.allclose(*found, atol=1e-6) and bool(found[0].any())


LARGE = 2_000_000 * 16 * 4  # bytes


def peak_of_a_large_table() -> int:
    """Bytes by which this process's largest size ever grows when a table of LARGE bytes is spread over both."""
    plan = et.plan([et.Feature("large", LARGE // 64)], "dense", dim=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tables = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("sgd"), device="meta")
    shard(tables, "row_wise", torch.device("cpu"))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def spawn(function: Any, world_size: int, *arguments: Any) -> None:
    torch.multiprocessing.spawn(function, (world_size, free_port(), *arguments), nprocs=world_size)
