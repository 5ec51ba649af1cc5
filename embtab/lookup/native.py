"""Lookups and updates by a compiled loop of our own, for CPUs: `native.cpp`, built by the C++ compiler on first use.

What it does otherwise than a kernel for any processor:

- rows are asked for sixteen entries before they are needed, and tables lie in large pages: most of a lookup in a table
  that no cache holds is waiting for memory; many vectors are written past the caches, which then need not read them;
- rows are computed of ids in one pass, hashes and quotients included;
- vectors are read table after table, which is nearly twice as quick as sample after sample, and written where they
  belong, [B, F, D], so that nothing is transposed; rows that make one vector together are put side by side, added or
  multiplied on the way;
- an update sums up the gradients of each row, found by a hash, and steps once; nothing is sorted;
- widths are not padded.

Every sum has one order and no multiplication is fused with an addition, so that tables come out bit by bit the same
with any number of threads, on any processor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from embtab.compiler import in_large_pages
from embtab.errors import UserError
from embtab.fused import FusedOptimizer, Optimizer
from embtab.lookup.base import Request, moved
from embtab.lookup.native_loop import CTables, Read, compiled_loop, placed_rows, tables_of, update
from embtab.lookup.stacked import StackedLookup
from embtab.methods.storage import Table

MAX_ROWS = 2**32
"""Rows of one width that an update can tell apart."""


class NativeLookup(StackedLookup):
    """Our own loop, with the optimizer fused into backward; no gradient is ever stored.

    Args:
        tables: the physical tables.
        fused: what backward does with the rows that were read.

    Raises:
        UserError: where there is no C++ compiler, or a width has 2^32 rows or more.
    """

    backend: ClassVar[str] = "native"

    joins = True
    fused: FusedOptimizer

    def __init__(self, tables: Sequence[Table], fused: FusedOptimizer) -> None:
        super().__init__(tables, fused)
        compiled_loop()
        for width, rows in self.stacked_rows.items():
            if rows >= MAX_ROWS:
                raise UserError(
                    f"the native backend takes fewer than 2^32 rows of one width; {rows} have width {width}"
                )
        self._stacks = {width: _Stack(rows, width, self.optimizer) for width, rows in self.stacked_rows.items()}
        # What autograd has to see so that it comes back: the tables get no gradient from it.
        self._hook = torch.zeros(0, dtype=torch.float32, requires_grad=True)
        self.list_tables()

    def placed_rows(
        self, arithmetic: str, ids: Tensor, sizes: Sequence[int], bases: Tensor, constants: Tensor
    ) -> Tensor:
        """In one pass; see the base class."""
        return placed_rows(arithmetic, ids, sizes, bases, constants)

    def stack(self, width: int) -> Tensor:
        """The matrix of this width."""
        return self._stacks[width].rows

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Answers each request with its sums: [B, W]; or where rows are joined with [B, C, V]."""
        answers: dict[int, Tensor] = {}
        for width in dict.fromkeys(request.width for request in requests):
            chosen = [i for i, request in enumerate(requests) if request.width == width]
            read = Read([requests[i] for i in chosen])
            weights = [requests[i].weights for i in chosen]
            update = self._update(width)
            trained = any(parameter.requires_grad for parameter in self.listed_of(width))
            hook = self._hook if trained else self._hook.detach()
            numbers: Tensor = _Vectors.apply(hook, self._stacks[width], update, read, *weights)
            shapes = read.shapes
            sizes = [math.prod(shape) for shape in shapes]
            parts = [numbers] if len(sizes) == 1 else numbers.split(sizes)  # a split copies the gradient
            shaped = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            answers |= {i: shaped[at] for i, at in zip(chosen, read.answers, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def _update(self, width: int) -> _Update | None:
        """What backward does to the tables of a width; None where they stay as they are."""
        listed = self.listed_of(width)
        frozen = torch.tensor([not parameter.requires_grad for parameter in listed])
        if not self.training or bool(frozen.all()):
            return None
        if not bool(frozen.any()):
            return _Update(self.fused, None)
        sizes = torch.tensor([len(parameter) for parameter in listed])
        return _Update(self.fused, frozen.repeat_interleave(sizes))

    def join_pass(self) -> None:
        """A backward pass within the present one is about to begin, and its steps are to be those of this one."""
        for stack in self._stacks.values():
            stack.passing()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Second moments: [num_rows] for rowwise_adagrad, [num_rows, W] for adagrad, nothing for sgd."""
        if self.optimizer.name == "sgd":
            return {}
        moments = {width: stack.moments for width, stack in self._stacks.items()}
        return {
            name: moments[table.width][self.base[name] : self.base[name] + table.num_rows]
            for name, table in self.tables.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeLookup:
        """Stays where it is.

        Raises:
            UserError: when the tables should go to another device, or become numbers of another type.
        """
        check_device(moved(fn, torch.device("cpu"), "native"))
        return self


def check_device(device: torch.device) -> None:
    """Makes sure that it is the CPU.

    Raises:
        UserError: when it is not.
    """
    if device.type != "cpu":
        raise UserError(f"the native backend trains on CPUs; for device {str(device)!r} take backend='fbgemm'")


class _Stack:
    """The tables of one width, as one matrix.

    One backward pass is one step of the optimizer, however often the tables were read for it, as with torch.optim.

    Attributes:
        rows: float32 [R, W].
        moments: of the optimizer: float32 [R], [R, W] or [0].
    """

    def __init__(self, count: int, width: int, optimizer: Optimizer) -> None:
        shapes = {"sgd": (0,), "adagrad": (count, width), "rowwise_adagrad": (count,)}
        self.rows = _zeros((count, width))
        self.moments = _zeros(shapes[optimizer.name])
        self._forget()

    def _forget(self) -> None:
        # Reads whose backward needs the rows as they were, with the version of the matrix that they read.
        self._awaiting: WeakKeyDictionary[Read, int] = WeakKeyDictionary()
        # The passes that run, by thread. The pass's owner is autograd, so that none outlives an error.
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def as_struct(self, settings: Optimizer | None = None) -> CTables:
        """As native.cpp takes them; to be read only, without settings of an optimizer."""
        return tables_of(self.rows, self.moments, settings)

    def await_rows(self, read: Read) -> None:
        """From now on steps leave a read the rows as it found them."""
        self._awaiting[read] = self.rows._version

    def check_rows(self, read: Read) -> None:
        """Makes sure that a read still has the rows as it found them.

        Raises:
            UserError: where others than a step have written to the tables.
        """
        if self._awaiting.get(read, self.rows._version) != self.rows._version:
            raise UserError(
                f"the tables of width {self.rows.shape[1]} were written to between forward and backward, whose "
                "gradients need the rows that forward has read; write to them after backward"
            )

    def let_go(self, read: Read) -> None:
        """A read needs its rows no longer."""
        self._awaiting.pop(read, None)

    def passing(self) -> _Pass:
        """The backward pass of this thread; of one within another (checkpoints), the outer one."""
        thread = threading.get_ident()
        found = self._passes.get(thread)
        if found is None or found.ended:
            found = self._passes[thread] = _Pass(self)
            torch.autograd.Variable._execution_engine.queue_callback(found.end)  # type: ignore[attr-defined]
        return found

    def save_awaited(self) -> None:
        """The rows are about to change: reads that need them get them as they are."""
        for read in list(self._awaiting):
            read.save(self.rows)
            self.let_go(read)


@dataclass(frozen=True, eq=False)
class _Update:
    """What backward does to the tables that were read.

    Attributes:
        fused: the optimizer.
        frozen: bool [R], rows that stay as they are; or None.
    """

    fused: FusedOptimizer
    frozen: Tensor | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Update) or self.fused is not other.fused:
            return False
        if self.frozen is None or other.frozen is None:
            return self.frozen is other.frozen
        return torch.equal(self.frozen, other.frozen)

    def step(self, stack: _Stack, reads: Sequence[tuple[Read, Tensor]]) -> None:
        """One step on all rows that were read, by the gradients of the answers."""
        settings = self.fused.settings
        with self.sparing(stack, [rows for read, _ in reads for rows in read.rows]):
            update(stack.as_struct(settings), reads)

    @contextmanager
    def sparing(self, stack: _Stack, rows: Sequence[Tensor]) -> Iterator[None]:
        """Puts back, at the end, those of the rows that are frozen."""
        if self.frozen is None:
            yield
            return
        spared = torch.cat([each.flatten() for each in rows]).unique()
        spared = spared[self.frozen[spared]]
        matrices = [stack.rows, *([stack.moments] if len(stack.moments) else [])]
        before = [matrix[spared] for matrix in matrices]
        yield
        for matrix, values in zip(matrices, before, strict=True):
            matrix[spared] = values


class _Pass:
    """The gradients that reach one stack in one backward pass."""

    def __init__(self, stack: _Stack) -> None:
        self.stack, self.ended = stack, False
        self._reads: list[tuple[_Update, Read, Tensor]] = []

    def reached(self, update: _Update, read: Read, gradient: Tensor) -> None:
        """A gradient has reached what was read."""
        self._reads.append((update, read, gradient))

    def end(self) -> None:
        """The pass is over: one step by all gradients; or several, where tables were frozen between the reads."""
        self.ended, reads = True, self._reads
        self._reads = []
        if reads:
            self.stack.save_awaited()
        for kind, some in groupby(reads, key=lambda each: each[0]):
            kind.step(self.stack, [each[1:] for each in some])


@torch.inference_mode(False)
def _zeros(shape: tuple[int, ...]) -> Tensor:
    return in_large_pages(torch.empty(shape, dtype=torch.float32)).zero_()


class _Vectors(torch.autograd.Function):
    """What is read -> the numbers of all answers, one after the other; backward hands their gradient to the pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        stack: _Stack,
        update: _Update | None,
        read: Read,
        *weights: Tensor | None,
    ) -> Tensor:
        ctx.stack, ctx.update, ctx.read = stack, update, read
        ctx.needs_rows = (read.multiplies and update is not None) or any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(*weights)  # torch refuses those that have changed in place since
        if torch._C._current_graph_task_id() >= 0:  # a checkpoint computes anew within a backward pass
            stack.passing()
        if ctx.needs_rows:
            stack.await_rows(read)
        return read.vectors(stack.as_struct())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stack, read, keeps = ctx.stack, ctx.read, torch._C._autograd._get_current_graph_task_keep_graph()
        if read is None:
            raise RuntimeError("trying to backward through the graph a second time; the first needs retain_graph=True")
        weights, gradient = ctx.saved_tensors, gradient.contiguous()
        if ctx.needs_rows:
            stack.check_rows(read)
        of_weights = [
            read.weight_gradients(i, stack.as_struct(), gradient) if ctx.needs_input_grad[4 + i] else None
            for i in range(len(weights))
        ]
        # Tables train where all gradients are asked for, and not where some are that weights have.
        if ctx.update is not None and torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
            stack.passing().reached(ctx.update, read, gradient)
        if not keeps:
            ctx.read = None
            stack.let_go(read)
        return None, None, None, None, *of_weights
