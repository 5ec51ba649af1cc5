"""The ids of the next batch travel while this one trains: torchrec's TrainPipelineSparseDist around sharded tables.

    batch t + 1 --copy, rows of ids--> questions --sizes, ids: all-to-all-->     (on streams of their own)
    batch t             forward                                       backward

Torchrec's pipeline wants to read a model whose sharded modules take their ids from the batch as they are; but here a
method makes rows of ids on the way. So it is given a model of nothing but the sharded modules, and batches of nothing
but rows, which are made where it copies a batch to the device. The loop stays Lightning's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embtab.errors import UserError
from embtab.lookup.base import Request
from embtab.sharding.batches import Questions
from embtab.tables import EmbeddingBagCollection


class Sent(list[Request], Pipelineable):
    """The requests of a batch whose ids are on their way.

    Args:
        requests: of the batch.
        questions: the same, by who answers them.
        beside: whatever else of the batch was made at the same time.
    """

    def __init__(self, requests: Sequence[Request], questions: Questions, beside: Any = None) -> None:
        super().__init__(requests)
        self.questions, self.batches, self.beside = questions, questions.batches(), beside
        self.context: Any = None
        cuda = any(request.rows.is_cuda for request in requests)
        self.made = torch.cuda.current_stream().record_event() if cuda else None

    def to(self, device: torch.device, non_blocking: bool = False) -> Sent:
        """Itself: it was made on the device."""
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from being reused before `stream` is done with it."""
        for tensor in tensors_of([list(self), self.questions, self.batches, self.beside]):
            tensor.record_stream(stream)

    def arrive(self) -> None:
        """Lets what follows on the current stream use what was made on another."""
        if self.made is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.made)
            self.record_stream(stream)


class Sender:
    """Hands rows to sharded modules by torchrec's pipeline; every process must send, and receive, the same batches.

    Args:
        collections: torchrec's sharded modules, by name. They must not be called but by the batches of `received`.
        device: of this process.
    """

    def __init__(self, collections: Mapping[str, nn.Module], device: torch.device) -> None:
        logging.getLogger("torchrec.distributed.train_pipeline").setLevel(logging.ERROR)
        self.collections = dict(collections)
        self.pipeline = TrainPipelineSparseDist(_Asked(self.collections), None, device)
        self._attached = not collections

    def send(self, batches: Iterator[Sent]) -> Sent | None:
        """Has the next batch made on the pipeline's stream, and sends the sizes of what it asks; None at the end."""
        sent, context = self.pipeline.copy_batch_to_gpu(batches)
        if sent is None:
            return None
        if self._attached:
            self.pipeline.start_sparse_data_dist(sent, context)
        else:
            self.pipeline.batches.append(sent)
            self.pipeline.contexts.append(context)
            self.pipeline.attach()  # which sends the first
            self.pipeline.batches.clear()
            self.pipeline.contexts.clear()
            self._attached = True
        sent.context = context
        return sent

    def send_rows(self, sent: Sent) -> None:
        """Sends the rows, once the sizes are there; nothing where that is done."""
        if self.collections:
            self.pipeline.wait_sparse_data_dist(sent.context)

    def sent_now(self, sent: Sent) -> Sent:
        """Sends a batch that nobody has sent ahead."""

        def made() -> Iterator[Sent]:
            sent.arrive()  # on the pipeline's stream
            yield sent

        found = self.send(made())
        assert found is not None
        return found

    def received(self, sent: Sent) -> dict[str, KeyedJaggedTensor]:
        """What to call the sharded modules with: they answer for the rows that they got of this batch."""
        self.send_rows(sent)
        for module in self.collections.values():
            module.forward.set_context(sent.context)  # type: ignore[attr-defined]
        return sent.batches


class _Asked(nn.Module):
    """What torchrec's pipeline reads: the sharded modules, each called with its part of a batch."""

    def __init__(self, collections: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, collection in collections.items():
            self.add_module(name, collection)

    def forward(self, batch: Any) -> list[Any]:
        return [collection(batch.batches[name]) for name, collection in self.named_children()]


class LookAhead:
    """Sends what each batch will ask of a collection while the batch before it trains.

    Args:
        tables: a collection whose tables are spread; asked once a step, with the KeyedJaggedTensor of the batch.
        device: of this process.
    """

    def __init__(self, tables: EmbeddingBagCollection, device: torch.device) -> None:
        self.tables, self.device = tables, device
        self.sender: Sender = tables.lookup.look_ahead()  # type: ignore[operator]
        self.current: Any = None
        self.next: Sent | None = None

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, on the device; when one comes, the ids of the one after it are on their way."""
        source = self._asked(batches)
        sent = self.sender.send(source)
        while sent is not None:
            self.next = self.sender.send(source)
            sent.arrive()
            self.current, ids, asked = sent.beside
            self.tables.prepared = (ids, asked, sent)
            yield self.current
            sent = self.next

    def send_rows(self) -> None:
        """Sends the rows of the next batch; best between forward and backward, when their sizes have arrived."""
        if self.next is not None:
            self.sender.send_rows(self.next)

    def _asked(self, batches: Iterator[Any]) -> Iterator[Sent]:
        for batch in batches:
            here = move_data_to_device(batch, self.device)
            ids = ids_of(here)
            with torch.no_grad():
                asked = self.tables.asked(ids)
                questions = self.tables.lookup.questions(asked.requests)  # type: ignore[operator]
            yield Sent(asked.requests, questions, (here, ids, asked))


class Through:
    """A loader whose batches pass through a function of iterators."""

    def __init__(self, loader: Iterable[Any], through: Callable[[Iterator[Any]], Iterator[Any]]) -> None:
        self.loader, self.through = loader, through

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return self.through(iter(self.loader))


def ids_of(batch: Any) -> KeyedJaggedTensor:
    """The KeyedJaggedTensor among the items or fields of a batch.

    Raises:
        UserError: when there is none, or more than one.
    """
    fields = batch if isinstance(batch, list | tuple) else vars(batch).values()
    found = [field for field in fields if isinstance(field, KeyedJaggedTensor)]
    if len(found) != 1:
        raise UserError(
            f"pipeline=True wants one KeyedJaggedTensor among the items or fields of a batch; there are {len(found)}"
        )
    return found[0]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in some containers and plain objects; modules, whose tensors live on, are left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, KeyedJaggedTensor):
        yield from tensors_of([value.values(), value.lengths(), value.weights_or_none()])
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_of(vars(value))
