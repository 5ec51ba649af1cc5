"""What both embedding collections share: the plan, the lookup backend, the blocks of features, and their state."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embtab.compiler import compiler
from embtab.errors import UserError, shown
from embtab.features import Feature
from embtab.fused import FusedOptimizer, Optimizer
from embtab.hashing import seed_of
from embtab.lookup.base import Lookup, usable_device
from embtab.lookup.init import Draw, generator
from embtab.lookup.make import make_lookup
from embtab.lookup.meta import Unmade
from embtab.methods.base import Encoding
from embtab.planning import Plan
from embtab.sizes import format_bytes
from embtab.tables.blocks import Arrays, Block, bases_of, make_blocks
from embtab.tables.opaque import numbered
from embtab.tables.reminder import Reminder

FLOAT = (
    "this quantises no embtab tables, which stay float32: plan them with precision='int8' and serve what et.save "
    "writes by embtab.bundle.quantised.QuantisedCollection; or map their class to it (additional_mapping of "
    "torchrec's quantize_embeddings, quantization_mapping of its quantize_inference_model)"
)


class Collection(nn.Module):
    """What both collections share: the plan, the lookup backend and the blocks of features.

    Attributes:
        per_process: whether each process of torch.distributed trains tables of its own on purpose, as independent
            trials do; else tables of the fbgemm and native backends are trained by several processes only once
            `TorchRecStrategy` has spread them.
    """

    per_process = False

    def __init__(
        self,
        plan: Plan,
        backend: str = "fbgemm",
        optimizer: Optimizer | None = None,
        init_std: float | None = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_plan(plan)
        self.check_features(plan.features)
        if not isinstance(optimizer, Optimizer | None):
            raise UserError(
                f"optimizer must be an embtab.Optimizer, such as Optimizer('adagrad', lr=0.05); got {shown(optimizer)}"
            )
        self.plan = plan
        device = usable_device(device)
        tables, later = list(plan.tables.values()), backend == "fbgemm" and device.type == "meta"
        device = torch.device("cpu") if later else device
        self.lookup: Lookup = Unmade(tables, optimizer) if later else make_lookup(tables, backend, device, optimizer)
        self.arrays = Arrays(plan.encodings, device)
        self.blocks = nn.ModuleList(make_blocks(plan, self.lookup, self.arrays)).to(device)
        self.names = [feature.name for feature in plan.features]
        self.has_mean = any(feature.pooling == "mean" for feature in plan.features)
        means = torch.tensor([feature.pooling == "mean" for feature in plan.features], device=device)
        self.register_buffer("means", means, persistent=False)
        self.reminder = Reminder(plan.encodings)
        self.number = numbered(self)
        self.init(init_std)

    def check_features(self, features: Sequence[Feature]) -> None:
        """Refuses features that this kind of collection has no vectors for; by default none.

        Raises:
            UserError: naming the feature.
        """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = numbered(self)  # a copy is not the original

    def _remind(self) -> None:
        """Takes note of a batch to train on.

        Raises:
            UserError: when other processes would train other tables.
        """
        if self.training and torch.is_grad_enabled():
            self.reminder.trained()
            self._check_processes()

    def _each_block(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @torch.no_grad()
    def init(self, std: float | None, seed: int | None = None) -> None:
        """Draws every table anew: zero mean, and composed vectors of standard deviation `std` whatever the method.

        Args:
            std: standard deviation of the entries of composed vectors. None leaves tables and trained arrays as they
                are (fresh ones are zero), for values that are loaded next.
            seed: makes every row a function of seed, table and row number, for tables in one piece and spread ones
                alike. If None, torch's global generator gives the numbers; or the seed, on the meta device.
        """
        if seed is None and isinstance(self.lookup, Unmade):
            seed = int(torch.randint(2**62, ()))
        if std is not None:
            self._draw_tables(std, seed)
        for space, encoding in self.plan.encodings.items():
            specs = encoding.arrays()
            for name, array in self.arrays.of(space).items():
                if specs[name].dtype != "float32":
                    random = np.random.default_rng(abs(seed_of(space, 0, self.plan.seed)))
                    array.copy_(torch.from_numpy(encoding.initial(name, random)))
                elif std is not None:
                    spread = specs[name].std * (std if specs[name].relative else 1)
                    source = None if seed is None else generator(f"{space}.{name}", 0, seed)
                    drawn = torch.empty(array.shape, dtype=torch.float32)
                    array.copy_(drawn.normal_(specs[name].mean, spread, generator=source))

    def _draw_tables(self, std: float, seed: int | None) -> None:
        """Draws each physical table once, however many features and parts share it."""
        starts = {
            name: start
            for encoding in self.plan.encodings.values()
            for name, start in zip(encoding.tables, encoding.start(std), strict=True)
        }
        if seed is not None:
            self.lookup.fill(Draw(self.plan.tables, starts, seed))
            return
        for name, start in starts.items():
            self.lookup.table(name).normal_(*start)

    @torch.no_grad()
    def adapt(self, step: int, epoch: int | None = None) -> list[str]:
        """Lets methods that reorganise themselves do so, where they say that it is time; to be called before each step.

        `RankingTask` calls it; a loop that trains 100 batches without it is warned. What they do depends on the tables,
        the ids seen in training mode, the plan's seed and `step`, and on nothing else, so a run that is resumed from a
        state dict goes on as if it had not stopped. The methods also move what the fused optimizer remembers; what an
        optimizer of the torch backend remembers of a row stays with the row.

        Args:
            step: batches trained so far; nothing happens before the first.
            epoch: epochs trained so far, where the coming batch is the first of an epoch; else None.

        Returns:
            The id spaces that were reorganised.
        """
        self.reminder.called()
        due = {space: e for space, e in self.plan.encodings.items() if e.adaptive and step > 0 and e.due(step, epoch)}
        for space, encoding in due.items():
            generator = np.random.default_rng([abs(seed_of(space, 0, self.plan.seed)), step])
            self.lookup.reorganise(encoding, self.arrays.of(space), generator)
        return list(due)

    @torch.no_grad()
    def round_to_served(self) -> None:
        """Replaces every row by the value that serving will read in the plan's precision; after it, stop training.

        Where tables are spread over processes, all of them call it.

        Raises:
            UserError: when a table holds an entry that cannot be stored in its precision; it names the table.
        """
        for name, table in self.plan.tables.items():
            try:
                self.lookup.round_to_served(name)
            except ValueError as error:
                raise UserError(f"table {name!r} cannot be served in {table.precision}: {error}") from None

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizer that backward applies to the tables: its group's learning rate is that of the next backward.

        Schedulers may drive it; `et.with_tables` joins it to another optimizer. `requires_grad_(False)` freezes tables.

        Raises:
            UserError: for the torch backend, whose optimizer is outside.
        """
        if self.lookup.fused is None:
            raise UserError("the torch backend has no optimizer of its own; set the learning rate of yours")
        return self.lookup.fused

    def set_learning_rate(self, lr: float) -> None:
        """Changes the table optimizer's learning rate; not for the torch backend, whose optimizer is outside.

        Raises:
            UserError: for the torch backend, or a rate that is negative or not finite.
        """
        self.fused_optimizer.set_learning_rate(lr)

    def get_extra_state(self) -> Tensor:
        """Uint8, JSON: the plan's digest, and the learning rate of fused tables."""
        facts: dict[str, Any] = {"plan": self.plan.digest}
        if self.lookup.fused is not None:
            facts |= {"lr": self.lookup.fused.base_lr, "first_lr": self.lookup.fused.defaults["lr"]}
        return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Makes sure that saved tables belong to this plan, and goes on with the learning rate they had.

        A collection that was made with another learning rate than the saved one keeps its own.

        Raises:
            UserError: when they belong to another plan.
        """
        try:
            facts = dict(json.loads(bytes(state.tolist())))
        except (ValueError, TypeError, AttributeError, RecursionError):
            facts = {}
        if facts.get("plan") != self.plan.digest:
            raise UserError(
                "the saved tables belong to another plan (features, methods, rows, dim or seed differ): ids would find "
                "other rows; make the collection from the plan they were trained with"
            )
        fused = self.lookup.fused
        if fused is not None and facts.get("first_lr") == fused.defaults["lr"]:
            fused.set_learning_rate(facts["lr"])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        missing: list[str] = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing[:] = [key for key in missing if key != f"{prefix}_extra_state"]  # whole tables alone may be given

    def compile_rows(self) -> None:
        """Fuses the integer arithmetic from ids to rows by torch.compile, for long bags and GPUs; no bit changes.

        The first batch then waits for a compiler (seconds), which must be there: a C++ one for CPUs, Triton for GPUs.

        Raises:
            UserError: when there is neither a C++ compiler nor a GPU.
        """
        if not torch.cuda.is_available():
            compiler("compile_rows")
        for block in self._each_block():
            block.fuse()

    def _check_processes(self) -> None:
        """DistributedDataParallel and DistributedModelParallel synchronise no table that trains inside backward.

        Raises:
            UserError: when processes would silently train different tables.
        """
        alone = self.lookup.fused is not None and not self.lookup.spread and not isinstance(self.lookup, Unmade)
        if not alone or self.per_process:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                f"each of {dist.get_world_size()} processes would train other tables; spread them by "
                'embtab.TorchRecStrategy, train them with backend="torch" under DistributedDataParallel, or set '
                "per_process = True on the collection where each process has a model of its own"
            )

    @property
    def qconfig(self) -> Any:
        """What torch's quantisation is told of this module; torch sets and removes it.

        Raises:
            AttributeError: where nothing has been set.
        """
        try:
            return self.__dict__["_qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is None:
            warnings.warn(FLOAT, stacklevel=2)
        self.__dict__["_qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("_qconfig", None)

    def pools(self, encoding: Encoding) -> bool:
        """Whether the lookup sums bags of an encoding's parts, or is asked for the parts of every id."""
        return encoding.linear

    def replace_lookup(self, lookup: Lookup) -> None:
        """Puts another lookup in place of the collection's, with the same tables, and the same values in them."""
        self.lookup.hand_over(lookup)
        self.lookup = lookup
        for block in self._each_block():
            block.set_bases(bases_of(self.plan, block.features, lookup.base))
            block.everyones = lookup.everyones

    def extra_repr(self) -> str:
        """Methods, tables, bytes, backend and the optimizer inside it."""
        methods = ", ".join(sorted({encoding.method for encoding in self.plan.encodings.values()}))
        inside = "" if self.lookup.fused is None else f", {self.lookup.fused.settings}"
        return (
            f"{methods}: {len(self.plan.features)} features, {len(self.plan.tables)} tables, "
            f"{format_bytes(self.plan.nbytes)}, {self.lookup.backend}{inside}"
        )


def check_plan(plan: object) -> None:
    """Refuses what is no plan.

    Raises:
        UserError: naming what it is.
    """
    if not isinstance(plan, Plan):
        raise UserError(f"tables are made from a plan, embtab.plan(features, ...); got {shown(plan)}")
