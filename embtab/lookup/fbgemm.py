"""Lookups and updates by fbgemm's table-batched kernels.

One trap is worked around here. On a CPU row-wise Adagrad is machine code that fbgemm makes at run time
(GenerateSparseAdaGrad), and it mixes AVX with the older SSE instructions. Some processors (Intel's Rocket Lake, where
this was found) wait at each such change: 0.4 microseconds a row, three quarters of a training step. For a table that
several features share the kernel has a compiled loop instead, which does not wait: 0.06. So where the made code is slow
(it is measured once, on 4096 rows) a table is said to have two features, and the bags are dealt out to them. Sums are
the same bit by bit; updates differ by roundings of the last place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import moved, padded
from embtab.lookup.stacked import SummingLookup
from embtab.methods.storage import Table

FEW_THREADS = 4
"""Up to which the compiled loop is worth it: it runs in one thread, the made code in as many as torch has."""


class FbgemmLookup(SummingLookup):
    """fbgemm's table-batched lookups with the optimizer fused into backward; fastest, and no gradient is ever stored.

    fbgemm wants widths in multiples of 4, so narrower rows are padded while training (not in what is saved). Its
    row-wise Adagrad averages squares over the padded width Wp: gradients times sqrt(Wp / W), and a learning rate times
    sqrt(W / Wp), make the moments and the step those of the definition.

    Each call of a collection is a step of its own: two calls before one backward are two steps, one after the other,
    which are one with SGD, and not with the others; the native backend makes one of them.

    Args:
        tables: the physical tables.
        device: where they live.
        fused: what backward does with the rows that were read.
    """

    backend: ClassVar[str] = "fbgemm"

    fused: FusedOptimizer

    def __init__(self, tables: Sequence[Table], device: torch.device | str, fused: FusedOptimizer) -> None:
        super().__init__(tables, fused)
        self.device = torch.device(device)
        self._kernels = self._made(self.device)
        self.list_tables()

    def _made(self, device: torch.device) -> dict[int, Any]:
        """One table-batched kernel per width, all rows zero."""
        settings = self.optimizer
        self._told = dict.fromkeys(self.stacked_rows, settings.lr)
        self._two_features = device.type == "cpu" and settings.name == "rowwise_adagrad" and _loop_is_quicker()
        return {
            width: make_kernel(
                rows, padded(width), replace(settings, lr=self._kernel_lr(width)), device, 1 + self._two_features
            )
            for width, rows in self.stacked_rows.items()
        }

    def stack(self, width: int) -> Tensor:
        """The kernel's matrix without its padding."""
        matrix: Tensor = self._kernels[width].split_embedding_weights()[0].detach()
        return matrix[:, :width]

    def sum_bags(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Sums by the fused kernel, whose backward updates the rows."""
        if torch.is_inference_mode_enabled():  # which the training kernel does not know
            with torch.inference_mode(False), torch.no_grad():
                return self.sum_bags(width, rows, offsets, weights)
        weights = None if weights is None else weights.float()
        fixed = None if weights is None else weights.detach()
        sums = self._sums(width, rows, offsets, fixed)
        if weights is None or not weights.requires_grad:
            return sums
        bags = None if offsets is None else torch.repeat_interleave(offsets.diff(), output_size=len(rows))
        weighted: Tensor = _Weighted.apply(sums, self.stack(width)[rows], bags, weights)
        return weighted

    def _sums(self, width: int, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """The same, for weights without a gradient."""
        call, kernel = (_by_two if self._two_features else _by_one), self._kernels[width]
        trained = [parameter.requires_grad for parameter in self.listed_of(width)]
        if not (self.training and any(trained)):
            with torch.no_grad():
                sums = call(kernel, rows, offsets, weights)[:, :width]
            # In evaluation backward passes as ever, and changes no table.
            return sums.requires_grad_(any(trained) and torch.is_grad_enabled())
        settings = self.optimizer
        self._tell(width, settings.lr)
        bags = len(rows) if offsets is None else len(offsets) - 1
        frozen = None if all(trained) else self._frozen_rows(width, rows, trained)
        if settings.weight_decay and torch.is_grad_enabled():
            each = (rows if frozen is None else rows[~frozen]).unique()
            rows, offsets, weights = _with_bags_of_one(rows, offsets, weights, each)
        sums = without_padding(call(kernel, rows, offsets, weights), width, settings, bags)
        if frozen is not None and sums.requires_grad:  # all rows of a bag are of one table
            bags_frozen = frozen if offsets is None else F.pad(frozen, (0, 1))[offsets[:bags]]
            sums = torch.where(bags_frozen.unsqueeze(1), sums.detach(), sums)
        return sums

    def _frozen_rows(self, width: int, rows: Tensor, trained: Sequence[bool]) -> Tensor:
        """Bool [N]: which rows are of tables that are frozen."""
        ends = torch.tensor([len(each) for each in self.listed_of(width)], device=rows.device).cumsum(0)
        frozen: Tensor = ~torch.tensor(trained, device=rows.device)[torch.bucketize(rows, ends, right=True)]
        return frozen

    def _kernel_lr(self, width: int) -> float:
        return self.optimizer.lr / scale_of(self.optimizer, width)

    def _tell(self, width: int, lr: float) -> None:
        """Hands a changed learning rate to the kernel."""
        if self._told[width] != lr:
            self._kernels[width].set_learning_rate(self._kernel_lr(width))
            self._told[width] = lr

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments: [num_rows] for rowwise_adagrad, [num_rows, W] for adagrad, nothing for sgd."""
        name = self.optimizer.name
        if name == "sgd":
            return {}
        states = {}
        for table in self.tables.values():
            moments = self._kernels[table.width].split_optimizer_states()[0][0].detach()
            if name == "adagrad":
                moments = moments.view(-1, padded(table.width))[:, : table.width]
            states[table.name] = moments[self.base[table.name] : self.base[table.name] + table.num_rows]
        return states

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FbgemmLookup:
        """Follows `.to(device)`: the kernel is made anew there, and tables and optimizer state are copied.

        Raises:
            UserError: for another type of numbers.
        """
        device = moved(fn, self.device, "fbgemm")
        if device != self.device:
            state = self.state_dict()
            self.device, self._kernels = device, self._made(device)
            self.relist()
            self.load_state_dict(state)
        return self


def without_padding(sums: Tensor, width: int, settings: Optimizer, bags: int | None = None) -> Tensor:
    """The sums [B, W] of a table, whose gradients reach the kernel as its optimizer wants them.

    Args:
        sums: float32 [B + U, Wp], of a kernel; the last U are rows, each distinct one of the batch, that decay.
        width: W.
        settings: of the optimizer.
        bags: B; all of the sums if None.
    """
    bags = len(sums) if bags is None else bags
    if sums.shape == (bags, width) and settings.max_gradient is None:
        return sums
    return _Outside.apply(sums, width, bags, settings)  # type: ignore[no-any-return]


class _Weighted(torch.autograd.Function):
    """Sums as they are; backward adds the gradients of the weights, by the rows as they were read.

    The kernel's own gradients of weights are by the rows of the time of its backward: another one may have stepped.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, read: Tensor, bags: Tensor | None, weights: Tensor) -> Tensor:
        ctx.save_for_backward(read, bags)
        return sums.view_as(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, bags = ctx.saved_tensors
        above = gradient if bags is None else gradient[bags]
        return gradient, None, None, (above * read).sum(1)


def scale_of(settings: Optimizer, width: int) -> float:
    """What gradients are multiplied by, so that the mean of squares over a padded row is that over the row."""
    return math.sqrt(padded(width) / width) if settings.name == "rowwise_adagrad" else 1.0


class _Outside(torch.autograd.Function):
    """What stands between the kernel's sums [B + U, Wp] and ours [B, W]: padding, clamped gradients, weight decay.

    The last U sums are the rows of the batch, each once, whose gradient is the weight decay.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, width: int, bags: int, settings: Optimizer) -> Tensor:
        ctx.shape, ctx.width, ctx.bags, ctx.settings = sums.shape, width, bags, settings
        ctx.save_for_backward(sums[bags:])
        return sums[:bags, :width].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (each_row,) = ctx.saved_tensors
        most = ctx.settings.max_gradient
        padded_gradient = gradient.new_zeros(ctx.shape)
        padded_gradient[: ctx.bags, : ctx.width] = gradient if most is None else gradient.clamp(-most, most)
        padded_gradient[ctx.bags :] = each_row * ctx.settings.weight_decay
        return padded_gradient.mul_(scale_of(ctx.settings, ctx.width)), None, None, None


def _with_bags_of_one(
    rows: Tensor, offsets: Tensor | None, weights: Tensor | None, further: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A lookup and, after its bags, a bag for each of some further rows."""
    offsets = torch.arange(len(rows) + 1, device=rows.device) if offsets is None else offsets
    ends = torch.arange(1, len(further) + 1, device=rows.device, dtype=offsets.dtype) + offsets[-1]
    weights = None if weights is None else torch.cat([weights, weights.new_ones(len(further))])
    return torch.cat([rows, further]), torch.cat([offsets, ends]), weights


def make_kernel(num_rows: int, width: int, optimizer: Optimizer, device: torch.device, features: int) -> Any:
    """A kernel with one table, all rows zero, that so many features share."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_gpu = device.type == "cuda"
    place = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
    kinds = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, width, place, compute)],
        feature_table_map=[0] * features,
        optimizer=kinds[optimizer.name],
        learning_rate=optimizer.lr,
        eps=optimizer.eps,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,  # rows are in range by construction; ids were checked before
        device=device,
    )


def _by_one(kernel: Any, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """[B, W], by a kernel whose table has one feature."""
    offsets = torch.arange(len(rows) + 1, device=rows.device) if offsets is None else offsets
    sums: Tensor = kernel(rows, offsets, weights)
    return sums


def _by_two(kernel: Any, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """[B, W], by a kernel whose table has two features: its answer [H, 2 W] has a bag of each in a row."""
    if offsets is None:  # even rows to one and odd rows to the other, so that sums come out in order
        bags = len(rows)
        sums = kernel(_even_odd(rows), _even(torch.arange(bags + 1)), None if weights is None else _even_odd(weights))
        sums = sums.view(bags + bags % 2, sums.shape[1] // 2)
    else:  # the first half to one, the second half to the other
        bags = len(offsets) - 1
        sums = kernel(rows, _even(offsets), weights)
        sums = sums.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
    return sums[:bags] if bags % 2 else sums  # a slice would copy the gradient


def _even_odd(values: Tensor) -> Tensor:
    """Values [N] at even places, and after them those at odd ones."""
    if len(values) % 2:
        return torch.cat([values[::2], values[1::2]])
    return values.view(-1, 2).t().reshape(-1)


def _even(offsets: Tensor) -> Tensor:
    """Offsets of an even number of bags: with an empty one at the end, if need be."""
    return offsets if len(offsets) % 2 else torch.cat([offsets, offsets[-1:]])


def _loop_is_quicker() -> bool:
    """Whether the compiled loop is the better one, with the threads that torch has now."""
    return torch.get_num_threads() <= FEW_THREADS and _made_code_waits()


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def _made_code_waits() -> bool:
    """Whether the code that fbgemm makes takes more than twice the time of its compiled loop.

    It takes seven times as much or hardly more, so that the answer is always the same on one machine.
    """
    rows = torch.arange(4096)
    gradient = torch.ones(len(rows), 16, dtype=torch.float32)
    optimizer, cpu = Optimizer(), torch.device("cpu")
    ways = [(_by_one, make_kernel(4096, 16, optimizer, cpu, 1)), (_by_two, make_kernel(4096, 16, optimizer, cpu, 2))]
    seconds = [float("inf")] * 2
    for _ in range(5):
        for i, (way, kernel) in enumerate(ways):
            sums = way(kernel, rows, None, None)
            started = time.perf_counter()
            sums.backward(gradient)
            seconds[i] = min(seconds[i], time.perf_counter() - started)
    return seconds[0] > 2 * seconds[1]
