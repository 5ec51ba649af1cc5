"""Which process holds which rows: torchrec's planner, told what each table may do. Needs no GPU, nor the processes."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.lookup.base import padded
from embtab.methods.storage import Table
from embtab.sizes import format_bytes

KINDS = ("table_wise", "row_wise", "row_wise_ids", "column_wise", "data_parallel")
"""With "row_wise", each device sums its rows of every bag, and these sums travel; with "row_wise_ids" the rows of the
ids do, and are summed where the bag is: far less for W devices and bags of fewer than W ids (see `cost`)."""
REPLICATED_BELOW = 1_000_000
"""Bytes of a table (with optimizer state) that "auto" keeps on every device. Its gradient is all-reduced in every step,
so a table pays for itself only as long as it is not much larger than what a batch would send for it."""

Kinds = Mapping[str, str]
"""By table: one of KINDS, or "auto" for table-wise or row-wise, whichever torchrec's planner thinks faster."""


def kinds(tables: Sequence[Table], asked: str | Mapping[str, str], optimizer: Optimizer) -> dict[str, str]:
    """How each table is to be spread.

    Args:
        tables: the physical tables.
        asked: "auto"; one of KINDS for all tables; or a map from table names to either, with "*" for the rest (which
            are "auto" without it).
        optimizer: of the tables.

    Raises:
        UserError: for an unknown table or kind, or one that the optimizer does not allow.
    """
    given = {"*": asked} if isinstance(asked, str) else dict(asked)
    names = [table.name for table in tables]
    for name, kind in given.items():
        if name != "*" and name not in names:
            raise UserError(f"sharding plan: no table {name!r}; there are {', '.join(names)}")
        if kind not in (*KINDS, "auto"):
            what = "sharding plan" if name == "*" else f"sharding plan of table {name!r}"
            raise UserError(f"{what}: {kind!r} is none of auto, {', '.join(KINDS)}")
        if kind == "column_wise" and optimizer.name == "rowwise_adagrad":
            raise UserError(
                f"sharding plan of table {name!r}: column_wise cuts rows, and rowwise_adagrad averages over whole "
                "rows; use row_wise or table_wise, or the adagrad or sgd optimizer"
            )
    chosen = {table.name: given.get(table.name, given.get("*", "auto")) for table in tables}
    for table in tables:
        if chosen[table.name] == "auto" and training_bytes(table, optimizer) < REPLICATED_BELOW:
            chosen[table.name] = "data_parallel"
    return chosen


def training_bytes(table: Table, optimizer: Optimizer) -> int:
    """Bytes of a table in training: float32 rows in fbgemm's padding, and what the optimizer remembers of them."""
    return table.num_rows * row_bytes(padded(table.width), optimizer)


def row_bytes(width: int, optimizer: Optimizer) -> int:
    """Bytes of a row of this width in training."""
    return 4 * (width + {"sgd": 0, "rowwise_adagrad": 1, "adagrad": width}[optimizer.name])


def codes(tables: Sequence[Table]) -> dict[str, str]:
    """What torchrec calls each table: it makes module names of its tables' names, which ours are not always."""
    return {table.name: f"t{i}" for i, table in enumerate(tables)}


class _Allowed:
    """Every kind on every device (torchrec's own sharders do not offer row-wise on a CPU), trained inside backward."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise"]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


class BagSharder(_Allowed, EmbeddingBagCollectionSharder):
    """Shards what is summed over bags."""


class IdSharder(_Allowed, EmbeddingCollectionSharder):
    """Shards what is read id by id."""


def sharders(optimizer: Optimizer) -> list[Any]:
    """Torchrec's sharders with the optimizer in the kernels."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    kind = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }[optimizer.name]
    fused = {"optimizer": kind, "learning_rate": optimizer.lr, "eps": optimizer.eps}
    # torchrec writes into the dictionary: each sharder gets its own.
    return [BagSharder(fused_params=copy.copy(fused)), IdSharder(fused_params=copy.copy(fused))]


def sharding_plan(
    modules: nn.ModuleDict,
    tables: Sequence[Table],
    kinds: Kinds,
    world_size: int,
    device_type: str,
    optimizer: Optimizer | None = None,
    device_bytes: int | None = None,
) -> ShardingPlan:
    """Torchrec's plan for its collections; a pure function of its arguments, so every process may compute it.

    Args:
        modules: from `modules.torchrec_modules`.
        tables: the physical tables.
        kinds: from `kinds`.
        world_size: number of processes, each with one device.
        device_type: "cuda" or "cpu".
        optimizer: of the tables.
        device_bytes: memory of a device (of a process, on a CPU); torchrec's assumption if None.

    Raises:
        UserError: when the tables do not fit.
    """
    constraints = {}
    by_code = {code: kinds[name] for name, code in codes(tables).items()}
    for module in modules.values():
        for config in _configs(module):
            kind = by_code[config.name]
            constraints[config.name] = ParameterConstraints(
                sharding_types=_types(kind, config.num_embeddings, world_size),
                compute_kernels=["fused"],
                min_partition=_columns(config.embedding_dim, world_size) if kind == "column_wise" else None,
            )
    memory = {"hbm_cap": device_bytes} if device_type == "cuda" else {"ddr_cap": device_bytes}
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", 8)), world_size)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            topology = Topology(world_size, device_type, local_world_size=local, **memory)
            planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, stats=[], debug=False)
            return planner.plan(modules, sharders(optimizer or Optimizer()))
    except PlannerError as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"the tables do not fit {world_size} devices as asked ({line}); use more devices, a smaller budget, or "
            "row_wise for the largest tables"
        ) from None
    finally:
        logging.disable(level)


def _configs(module: nn.Module) -> list[Any]:
    read = "embedding_bag_configs" if hasattr(module, "embedding_bag_configs") else "embedding_configs"
    return list(getattr(module, read)())


def _types(kind: str, rows: int, world_size: int) -> list[str]:
    """What the planner may choose. A table too short to give every process rows stays in one piece: fbgemm's kernels
    refuse to hold none.
    """
    short = -(-rows // world_size) * (world_size - 1) >= rows
    allowed = ["table_wise", "row_wise"] if kind == "auto" else [kind.removesuffix("_ids")]
    return ["table_wise" if short and each == "row_wise" else each for each in allowed]


def _columns(width: int, world_size: int) -> int:
    """Columns of a part: the fewest, in multiples of 4 that divide the width, for at most one part a process."""
    return next(c for c in range(4, width + 1, 4) if width % c == 0 and width // c <= world_size)


@dataclass(frozen=True)
class Placed:
    """One table of a sharding plan: its kind, and its training bytes on each device."""

    table: Table
    kind: str
    bytes_on: tuple[int, ...]


def placed(
    tables: Sequence[Table], plan: ShardingPlan | None, kinds: Kinds, world_size: int, optimizer: Optimizer
) -> list[Placed]:
    """The training bytes (rows and optimizer state) of every table on every device."""
    specs = {} if plan is None else {name: spec for module in plan.plan.values() for name, spec in module.items()}
    found = []
    called = codes(tables)
    for table in tables:
        if kinds[table.name] == "data_parallel":
            found.append(Placed(table, "data_parallel", (training_bytes(table, optimizer),) * world_size))
            continue
        on = [0] * world_size
        spec = specs[called[table.name]]
        for shard in spec.sharding_spec.shards:
            rows, columns = shard.shard_sizes
            on[shard.placement.rank()] += rows * row_bytes(columns, optimizer)
        found.append(Placed(table, spec.sharding_type, tuple(on)))
    return found


def describe(found: Sequence[Placed], device_bytes: int | None = None) -> str:
    """For people: how each table is spread, and what each device holds."""
    rows = [("table", "rows x width", "kind", "devices", "training bytes")]
    for one in found:
        used = [rank for rank, size in enumerate(one.bytes_on) if size]
        where = "all" if len(used) == len(one.bytes_on) else ", ".join(map(str, used))
        shape = f"{one.table.num_rows} x {one.table.width}"
        each = " each" if one.kind == "data_parallel" else ""
        size = one.bytes_on[0] if each else sum(one.bytes_on)
        rows.append((one.table.name, shape, one.kind, where, format_bytes(size) + each))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    totals = [sum(sizes) for sizes in zip(*(one.bytes_on for one in found), strict=True)]
    for rank, total in enumerate(totals):
        share = "" if device_bytes is None else f" ({100 * total / device_bytes:.3g} % of {format_bytes(device_bytes)})"
        lines.append(f"device {rank}: {format_bytes(total)}{share}")
    return "\n".join(lines)
