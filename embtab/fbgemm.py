"""Lookups and updates by fbgemm's table-batched kernels.

One trap is worked around here. On a CPU row-wise Adagrad is machine code that fbgemm makes at run time
(GenerateSparseAdaGrad), and it mixes AVX with the older SSE instructions. Some processors (Intel's Rocket Lake, where
this was found) wait at each such change: 0.4 microseconds a row, three quarters of a training step. For a table that
several features share the kernel has a compiled loop instead, which does not wait: 0.06. So where the made code is slow
(it is measured once, on 4096 rows) a table is said to have two features, and the bags are dealt out to them. Sums are
the same bit by bit; updates differ by roundings of the last place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from embtab.lookup import Optimizer, SummingLookup, padded
from embtab.methods import Table

FEW_THREADS = 4
"""Up to which the compiled loop is worth it: it runs in one thread, the made code in as many as torch has."""


class FbgemmLookup(SummingLookup):
    """fbgemm's table-batched lookups with the optimizer fused into backward; fastest, and no gradient is ever stored.

    The tables are no torch parameters: `parameters()` does not list them, and no outer optimizer can touch them.
    fbgemm wants widths in multiples of 4, so narrower rows are padded while training (not in what is saved); row-wise
    Adagrad then averages squares over the padded width.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device | str, optimizer: Optimizer) -> None:
        super().__init__(tables)
        self.optimizer = optimizer
        self.device = torch.device(device)
        self._kernels = self._made(self.device)

    def _made(self, device: torch.device) -> dict[int, Any]:
        """One table-batched kernel per width, all rows zero."""
        self._two_features = device.type == "cpu" and self.optimizer.name == "rowwise_adagrad" and _loop_is_quicker()
        sizes = self.stacked_rows.items()
        return {
            width: make_kernel(rows, padded(width), self.optimizer, device, 1 + self._two_features)
            for width, rows in sizes
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
        sums = (_by_two if self._two_features else _by_one)(self._kernels[width], rows, offsets, weights)
        return sums if width == padded(width) else sums[:, :width]

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments: [num_rows] for rowwise_adagrad, [num_rows, W] for adagrad, nothing for sgd."""
        if self.optimizer.name == "sgd":
            return {}
        states = {}
        for name, table in self.tables.items():
            moments = self._kernels[table.width].split_optimizer_states()[0][0].detach()
            if self.optimizer.name == "adagrad":
                moments = moments.view(-1, padded(table.width))[:, : table.width]
            states[name] = moments[self.base[name] : self.base[name] + table.num_rows]
        return states

    def set_learning_rate(self, lr: float) -> None:
        """Changes the learning rate of all tables from the next backward on."""
        for kernel in self._kernels.values():
            kernel.set_learning_rate(lr)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FbgemmLookup:
        """Follows `.to(device)`: the kernel is made anew there, and tables and optimizer state are copied."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            state = self.state_dict()
            self.device, self._kernels = device, self._made(device)
            self.load_state_dict(state)
        return self


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
    gradient = torch.ones(len(rows), 16)
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
