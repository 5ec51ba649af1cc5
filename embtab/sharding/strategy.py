"""Lightning's Trainer on many processes with sharded tables: Trainer(strategy=embtab.TorchRecStrategy())."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from embtab.datasets.epochs import Epochs
from embtab.errors import UserError
from embtab.lookup.base import slot
from embtab.lookup.fbgemm import FbgemmLookup
from embtab.lookup.meta import Unmade
from embtab.lookup.native import NativeLookup
from embtab.planning import Plan
from embtab.sharding import checkpoint as folders
from embtab.sharding.lookup import ShardedLookup
from embtab.sharding.pipeline import LookAhead, Through
from embtab.sharding.placement import kinds
from embtab.tables import EmbeddingBagCollection, EmbeddingCollection

Collection = EmbeddingBagCollection | EmbeddingCollection
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "ncclremoteerror")


class TorchRecStrategy(DDPStrategy):
    """Spreads embtab's tables over all processes by torchrec; everything else is data-parallel, as in Lightning's DDP.

    One process per device, started by `Trainer(devices=N)` or by torchrun on any number of hosts; NCCL on GPUs, gloo on
    CPUs. The loss is the mean over processes, so N processes with batches of B rows train as one with N * B.
    Tables must have the fbgemm backend (the default); the optimizer it was given trains them inside backward.
    Checkpoints are folders (see `embtab.sharding.checkpoint`), which any number of processes can continue, under any
    sharding plan. Embedding collections of torchrec itself are left to DDP.

    Args:
        plan: "auto" (small tables on every device, torchrec's planner for the others); one of
            `placement.KINDS` for all tables; or a map from names of physical tables (as in `plan.describe()`) to one of
            these, with "*" for the rest.
        pipeline: send the ids of the next batch while this one trains, see `embtab.sharding.pipeline`; the numbers stay
            the same. For one EmbeddingBagCollection, of methods that do not reorganise themselves, and batches with one
            KeyedJaggedTensor, as in `RankingTask`.
        **options: of Lightning's DDPStrategy, such as `timeout` and `process_group_backend`.

    Raises:
        UserError: in `Trainer.fit` and its like, on every process, when tables cannot be spread so.
    """

    strategy_name = "torchrec"

    def __init__(self, plan: str | dict[str, str] = "auto", pipeline: bool = False, **options: Any) -> None:
        # The buffers are constants, some of types that gloo cannot send; `forward_sync_buffers` would send them once.
        super().__init__(**{"broadcast_buffers": False, **options})
        self.plan, self.pipeline = plan, pipeline
        self._ahead: LookAhead | None = None
        self._source: Path | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Tables are spread first, and read into their parts then."""
        return True

    def setup_environment(self) -> None:
        """Also sees to it that the processes part in good order: without it, half of all gloo runs exit non-zero."""
        super().setup_environment()
        atexit.register(_leave)

    def setup(self, trainer: Trainer) -> None:
        """Spreads the tables, before optimizers are made."""
        module = self.lightning_module
        assert module is not None
        found = dict(collections_of(module))
        if not isinstance(self.plan, str):
            known = {name for collection in found.values() for name in collection.plan.tables}
            for name in self.plan:
                if name != "*" and name not in known:
                    raise UserError(f"sharding plan: no table {name!r}; there are {', '.join(sorted(known))}")
        for collection in found.values():
            if not isinstance(collection.lookup, ShardedLookup):
                shard(collection, self._asked(collection), self.root_device)
        if self.pipeline and trainer.state.fn == TrainerFn.FITTING and self._ahead is None:
            self._ahead = LookAhead(pipelined(found), self.root_device)
        super().setup(trainer)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Lets training batches pass through the pipeline, where there is one."""
        module = self.lightning_module
        if self._ahead is None or module is None or not module.trainer.training:
            return dataloader
        if isinstance(dataloader, Epochs):  # it counts what has left the pipeline, and not what has entered it
            dataloader.through = self._ahead
            return dataloader
        return Through(dataloader, self._ahead)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Leaves the pipeline's batches, which are there, as they are."""
        if self._ahead is not None and batch is self._ahead.current:
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Also sends the rows of the next batch, whose sizes have travelled during forward."""
        if self._ahead is not None:
            self._ahead.send_rows()
        super().pre_backward(closure_loss)

    def _asked(self, collection: Collection) -> str | dict[str, str]:
        if isinstance(self.plan, str):
            return self.plan
        return {name: kind for name, kind in self.plan.items() if name == "*" or name in collection.plan.tables}

    def configure_ddp(self) -> None:
        """Wraps what is left in DDP, if anything is left to train."""
        assert self.model is not None
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                super().configure_ddp()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a folder, together with all processes; it is complete or absent."""
        state = _tensors(checkpoint.pop("state_dict"))
        random: list[Any] = [None] * self.world_size
        dist.all_gather_object(random, torch.get_rng_state())
        beside = {"shapes": self._shapes(), "random_states": random}
        folders.save(Path(self.broadcast(str(filepath))), state, {**checkpoint, **beside})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Everything but the tensors of a folder; or the content of a file that a single process wrote."""
        path = folders.found(checkpoint_path)
        self._source = None
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint; many hosts need it on a file system that they share")
        if path.is_file():
            whole_file: dict[str, Any] = super().load_checkpoint(path, weights_only)
            return whole_file
        meta = folders.read_meta(path)
        self._source = path
        random = meta.pop("random_states")
        if "embtab" in meta and len(random) == self.world_size:
            meta["embtab"]["random_state"] = random[self.global_rank]
        return {**meta, "state_dict": {}}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Reads the parts of tables that this process holds, and everything else."""
        module = self.lightning_module
        assert module is not None
        if self._source is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        optional = {
            f"{prefix}.{name}"
            for prefix, collection in collections_of(module)
            for name in (
                *(f"lookup.{key}" for key in collection.lookup.optional_state()),
                *(f"arrays.{key}" for key in collection.arrays.optional_state()),
            )
        }
        folders.load(self._source, _tensors(module.state_dict()), lambda name: not strict or name in optional)

    def on_exception(self, exception: BaseException) -> None:
        """Says in the first line that another process is gone, where that is the cause."""
        super().on_exception(exception)
        text = str(exception).lower()
        if isinstance(exception, RuntimeError) and any(sign in text for sign in _LOST):
            exception.args = (
                f"rank {self.global_rank} of {self.world_size} stops: another process of the run died or hangs. Start "
                f"all processes again with ckpt_path=<the last checkpoint>. ({exception})",
            )

    def _shapes(self) -> dict[str, list[int]]:
        """Of every table, as it is without padding, by its name in the checkpoint."""
        assert self.lightning_module is not None
        return {
            f"{prefix}.lookup.{table.name}{state}": [table.num_rows, table.width]
            for prefix, collection in collections_of(self.lightning_module)
            for table in collection.plan.tables.values()
            for state in ("", ".optimizer")
        }


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what collections say of themselves, which the checkpoint's plan and optimizers say too."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def collections_of(module: LightningModule) -> Iterator[tuple[str, Collection]]:
    """The embedding collections inside a module, by name."""
    for name, child in module.named_modules():
        if isinstance(child, Collection):
            yield name, child


def pipelined(found: Mapping[str, Collection]) -> EmbeddingBagCollection:
    """The collection of a module whose ids can be sent a batch ahead.

    Raises:
        UserError: when there is none, or more than one.
    """
    tables = next(iter(found.values()), None)
    if len(found) != 1 or not isinstance(tables, EmbeddingBagCollection):
        raise UserError(
            "pipeline=True is for modules with one EmbeddingBagCollection and no other collection of embtab; leave it "
            "out"
        )
    for space, encoding in tables.plan.encodings.items():
        if encoding.adaptive:
            raise UserError(
                f"pipeline=True computes rows a batch ahead, but method {encoding.method!r} of {space!r} changes them "
                "between batches; leave it out"
            )
    return tables


def slots(plan: Plan, collection: type[Collection] = EmbeddingBagCollection) -> tuple[dict[str, str], dict[str, str]]:
    """The tables of the slots that are summed over bags, and of those that are read id by id."""
    bags: dict[str, str] = {}
    ids: dict[str, str] = {}
    for feature in plan.features:
        encoding = plan.encodings[feature.space]
        group = bags if encoding.linear and collection is EmbeddingBagCollection else ids
        group |= {slot(feature.name, k): table for k, table in enumerate(encoding.tables)}
    return bags, ids


def shard(collection: Collection, asked: str | Mapping[str, str], device: torch.device) -> None:
    """Spreads the tables of a collection over all processes; each gives its part of the values it has.

    Args:
        collection: with the fbgemm backend, or on the meta device.
        asked: as `plan` of `TorchRecStrategy`.
        device: of this process.

    Raises:
        UserError: for another backend, a collection that learns its shape, or a plan that cannot be.
    """
    if type(collection) not in (EmbeddingBagCollection, EmbeddingCollection):
        raise UserError(
            f"a {type(collection).__name__} is trained by one process: what it learns belongs to rows of whole tables; "
            "search with embtab search, and train the method that comes out (pruned, sparse) by any number of processes"
        )
    if not isinstance(collection.lookup, FbgemmLookup | NativeLookup | Unmade):
        raise UserError(
            "tables of the torch backend are trained by the outer optimizer, which sharded tables cannot be; use "
            'backend="fbgemm" with optimizer=embtab.Optimizer(...)'
        )
    tables, fused = list(collection.plan.tables.values()), collection.fused_optimizer
    bags, ids = slots(collection.plan, type(collection))
    sharded = ShardedLookup(tables, bags, ids, kinds(tables, asked, fused.settings), fused, device)
    collection.replace_lookup(sharded)
    sharded.replicas.agree()


def gathered(collection: Collection) -> Collection:
    """The same collection in one piece with the fbgemm backend, on every process; called by all of them."""
    lookup = collection.lookup
    if not isinstance(lookup, ShardedLookup):
        return collection
    one = type(collection)(collection.plan, optimizer=lookup.optimizer, init_std=None)
    one.lookup.load_state_dict(lookup.gathered())
    one.arrays.load_state_dict(collection.arrays.state_dict())
    return one


def _leave() -> None:
    """Leaves the group once the others are about to, or at once where they are gone."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_backend() == "gloo":
        with suppress(RuntimeError):
            dist.monitored_barrier(timeout=timedelta(seconds=10))
    dist.destroy_process_group()
