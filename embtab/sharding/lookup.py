"""The third lookup backend: tables spread over the processes of torch.distributed by torchrec.

    rows of slots --all-to-all--> the processes that hold them --sum--> parts --all-to-all--> back

A *slot* is one part of one feature; to torchrec it is a feature of its own, whose table is the part's physical table.
Parts that are summed over bags go through one EmbeddingBagCollection, parts of single ids through one
EmbeddingCollection per width (torchrec's own limit), each wrapped in DistributedModelParallel. Their optimizer runs
inside backward, as in the fbgemm backend. Tables that every process holds in full ("data_parallel") stay here: torchrec
would lose their optimizer, and sums bags that it should not on a CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import Lookup, Request, padded
from embtab.lookup.fbgemm import scale_of
from embtab.lookup.init import BLOCK, Draw
from embtab.methods.base import Encoding
from embtab.methods.storage import Table
from embtab.sharding.adaptive import everyones, reorganise
from embtab.sharding.batches import Questions, slots_of
from embtab.sharding.modules import bags_of, ids_of, torchrec_modules
from embtab.sharding.pipeline import Sender, Sent
from embtab.sharding.placement import Kinds, codes, sharders, sharding_plan
from embtab.sharding.processes import first_says, size_of, whole
from embtab.sharding.replicas import Replicas
from embtab.sharding.served import round_shards


class ShardedLookup(Lookup):
    """Tables spread over the processes of the default group; every process must make it, and call it, together.

    All values are zero at first. The tables are no torch parameters: no outer optimizer can touch them.

    Args:
        tables: the physical tables.
        bags: the table of every slot that is summed over bags.
        ids: the table of every slot that is read id by id.
        kinds: how each table is spread, from `placement.kinds`.
        fused: applied inside backward, to gradients that are the mean over processes.
        device: of this process.

    Raises:
        UserError: when torchrec cannot spread the tables so.
    """

    backend: ClassVar[str] = "torchrec"
    spread: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[Table],
        bags: Mapping[str, str],
        ids: Mapping[str, str],
        kinds: Kinds,
        fused: FusedOptimizer,
        device: torch.device,
    ) -> None:
        super().__init__(tables, fused)
        optimizer = fused.settings
        if optimizer.weight_decay:
            raise UserError("torchrec's kernels for CPUs know no weight decay; train sharded tables without it")
        self.kinds, self._trains = dict(kinds), True
        self.table_of = {**bags, **ids}
        local = [table for table in tables if kinds[table.name] == "data_parallel"]
        self.replicated = {table.name for table in local}
        modules = torchrec_modules(tables, kinds, bags, ids)
        self._names = {code: name for name, code in codes(tables).items()}
        # In a list, out of sight: torch's own state dict, `parameters()` and `.to()` are not for them.
        self._hidden: list[Any] = [Replicas(local, device, fused), None, None]
        self._device = device
        if modules:
            world = dist.get_world_size()
            plan = first_says(lambda: sharding_plan(modules, tables, kinds, world, device.type, optimizer))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._hidden[1] = DistributedModelParallel(
                    modules,
                    env=ShardingEnv.from_process_group(dist.group.WORLD),
                    device=device,
                    plan=plan,
                    sharders=sharders(optimizer),
                    init_data_parallel=False,
                )
        self._told = math.nan
        with torch.no_grad():
            for shards in self._shards().values():  # torchrec drew them from a uniform distribution
                for shard in shards.local_shards():
                    shard.tensor.zero_()

    @property
    def replicas(self) -> Replicas:
        """The tables that this process holds in full."""
        found: Replicas = self._hidden[0]
        return found

    @property
    def collections(self) -> dict[str, Any]:
        """Torchrec's sharded collections, by name."""
        return {} if self._hidden[1] is None else dict(self._hidden[1].module.items())

    def questions(self, requests: Sequence[Request]) -> Questions:
        """Who is to answer what."""
        found = Questions([len(request.slots) for request in requests], [], {})
        for i, request in enumerate(requests):
            for j, one in enumerate(slots_of(request)):
                if self.table_of[one.slots[0]] in self.replicated:
                    found.here.append(((i, j), self._rebased(one)))
                else:
                    found.away.setdefault(self._collection(one), []).append(((i, j), one))
        return found

    def look_ahead(self) -> Sender:
        """From now on ids go through torchrec's pipeline, by which they may leave a batch ahead."""
        self._hidden[2] = Sender(self.collections, self._device)
        sender: Sender = self._hidden[2]
        return sender

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers each request with its sums [B, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training and self._trains):
            return self._answers(requests)

    def _answers(self, requests: Sequence[Request]) -> list[Tensor]:
        settings = self.optimizer
        self._tell(settings)
        questions = requests.questions if isinstance(requests, Sent) else self.questions(requests)
        if self._hidden[2] is None:
            batches = questions.batches()
        else:
            sent = requests if isinstance(requests, Sent) else self._hidden[2].sent_now(Sent(requests, questions))
            batches = self._hidden[2].received(sent)
        # All are asked before the first is waited for.
        waiting = {name: self.collections[name](batch) for name, batch in batches.items()}
        here = self.replicas([one for _, one in questions.here])
        return questions.answers(here, {name: answer.wait() for name, answer in waiting.items()}, settings)

    def _collection(self, one: Request) -> str:
        if one.lengths is None or self.kinds[self.table_of[one.slots[0]]] == "row_wise_ids":
            return ids_of(one.width)
        if one.weights is not None and one.weights.requires_grad:
            raise UserError(
                f"slot {one.slots[0]!r}: weights of a batch get no gradient from sharded tables; "
                "read the ids through an EmbeddingCollection and weigh its vectors"
            )
        return bags_of(one.width)

    def _rebased(self, one: Request) -> Request:
        base = self.replicas.base[self.table_of[one.slots[0]]]
        return Request(one.width, one.rows + base, one.lengths, one.weights)

    def _shards(self) -> dict[str, Any]:
        """The ShardedTensor of every table that is spread."""
        return {
            self._names[key.split(".")[-2]]: value
            for collection in self.collections.values()
            for key, value in collection.state_dict().items()
        }

    def table(self, name: str) -> Tensor:
        """The table where this process holds all of it.

        Raises:
            UserError: where it does not.
        """
        if name in self.replicated:
            return self.replicas.table(name)
        raise UserError(f"table {name!r} is spread over processes; gather it with embtab.sharding.strategy.gathered")

    def parts(self, name: str) -> list[Tensor]:
        """What this process holds of a table, padded to a multiple of four columns where it is spread."""
        return [self.table(name)] if name in self.replicated else [each.tensor for each in self._held(name)]

    def round_to_served(self, name: str) -> None:
        """Rounds what this process holds; called by every process."""
        if name in self.replicated:
            super().round_to_served(name)
        elif self.tables[name].precision != "fp32":
            round_shards(self._held(name), self.tables[name], self.kinds[name] != "column_wise")

    def _held(self, name: str) -> list[Any]:
        """The shards of a table that this process holds; perhaps none."""
        shards = self._shards().get(name)
        return [] if shards is None else list(shards.local_shards())

    def named_state(self) -> dict[str, Any]:
        """The tables: those that are spread as ShardedTensors of rows padded to a multiple of four."""
        spread = self._shards()
        return {name: spread[name] if name in spread else self.replicas.table(name) for name in self.tables}

    def optimizer_state(self) -> dict[str, Any]:
        """Second moments: of tables that are spread as ShardedTensors, padded as the tables are."""
        found = self.replicas.optimizer_state()
        for collection in self.collections.values():
            # The keys are those of the tables; a process without a part of a table does not list it.
            for entry in collection.fused_optimizer.state_dict()["state"].values():
                moments = {key.split(".")[0]: value for key, value in entry.items() if key.endswith(".momentum1")}
                found |= {self._names[code]: value for code, value in moments.items()}
        return {} if self.optimizer.name == "sgd" else found

    def gathered(self) -> dict[str, Tensor]:
        """The state dict with tables in full, without padding, on every process; called by all of them."""
        tables, moments = self.named_state(), self.optimizer_state()
        return {key: value for name in self.tables for key, value in self._whole(name, tables, moments).items()}

    def _whole(self, name: str, tables: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Tensor]:
        """A table in full and what the optimizer remembers of it, as in a state dict."""
        table = self.tables[name]
        size = (table.num_rows, padded(table.width))
        found = {name: whole(tables[name], size)[:, : table.width]}
        if self.optimizer.name == "adagrad":
            found[f"{name}.optimizer"] = whole(moments.get(name), size)[:, : table.width]
        elif self.optimizer.name == "rowwise_adagrad":
            found[f"{name}.optimizer"] = whole(moments.get(name), size[:1])
        return found

    @torch.no_grad()
    def assign(self, target: Any, saved: Any) -> bool:
        """Writes the part of a whole table (or of its moments) that this process holds."""
        if isinstance(target, Tensor) and not hasattr(target, "local_shards"):
            return super().assign(target, saved)
        if hasattr(saved, "local_shards"):
            pairs = zip(target.local_shards(), saved.local_shards(), strict=True)
            for mine, other in pairs:
                mine.tensor.copy_(other.tensor)
            return True
        whole = list(saved.shape)
        padding = [*whole[:1], *(padded(width) for width in whole[1:])]
        if size_of(target) != padding:
            return False
        for shard in target.local_shards():
            starts = shard.metadata.shard_offsets
            part = saved
            for axis, (start, size) in enumerate(zip(starts, shard.tensor.shape, strict=True)):
                part = part.narrow(axis, min(start, whole[axis]), max(0, min(size, whole[axis] - start)))
            inner = shard.tensor
            for axis, size in enumerate(part.shape):
                inner = inner.narrow(axis, 0, size)
            inner.copy_(part)
        return True

    @torch.no_grad()
    def fill(self, draw: Draw) -> None:
        """Draws the first values of what this process holds, by the seed of rank 0."""
        draw = replace(draw, seed=first_says(lambda: draw.seed))
        self.replicas.fill(draw)
        for name, shards in self._shards().items():
            for shard in shards.local_shards():
                first, column = shard.metadata.shard_offsets
                stop = min(first + len(shard.tensor), self.tables[name].num_rows)
                for low in range(first, stop, BLOCK):
                    high = min(low + BLOCK, stop)
                    values = draw.rows(name, low, high)[:, column : column + shard.tensor.shape[1]]
                    shard.tensor[low - first : high - first, : values.shape[1]].copy_(values)

    def everyones(self, ids: Tensor) -> Tensor:
        """The ids of all processes; called by all of them."""
        return everyones(ids)

    def reorganise(self, encoding: Encoding, arrays: Mapping[str, Tensor], generator: np.random.Generator) -> None:
        """Rank 0 gathers the tables and reorganises them, and every process takes its part of them."""
        tables, moments = self.named_state(), self.optimizer_state()
        whole = {key: value for name in encoding.tables for key, value in self._whole(name, tables, moments).items()}
        reorganise(encoding, whole, arrays, generator)
        for name in dict.fromkeys(encoding.tables):
            self.assign(tables[name], whole[name])
            if name in moments:
                self.assign(moments[name], whole[f"{name}.optimizer"])

    def _tell(self, settings: Optimizer) -> None:
        """Hands a changed learning rate to the kernels."""
        if settings.lr == self._told:
            return
        self._told = settings.lr
        widths = {of(table.width): table.width for table in self.tables.values() for of in (bags_of, ids_of)}
        for name, collection in self.collections.items():
            for group in collection.fused_optimizer.param_groups:
                group["lr"] = settings.lr / scale_of(settings, widths[name])
            collection.fused_optimizer.step()  # which only hands the learning rate to the kernels

    def frozen(self) -> set[str]:
        """All tables, or none."""
        return set() if self._trains else set(self.tables)

    def freeze(self, names: set[str]) -> None:
        """From now on backward leaves the tables as they are.

        Raises:
            UserError: when it is to leave some, and train others.
        """
        if names and names != set(self.tables):
            raise UserError(
                f"table {min(names)!r} is frozen and {min(set(self.tables) - names)!r} is not: tables that are spread "
                "over processes are frozen together; put those that stay into a collection of their own"
            )
        self._trains = not names

    def requires_grad_(self, requires_grad: bool = True) -> ShardedLookup:
        """Freezes all tables, or lets them train again."""
        self._trains = requires_grad
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedLookup:
        """Ignores `.to(device)`: the tables were made where they belong."""
        return self
