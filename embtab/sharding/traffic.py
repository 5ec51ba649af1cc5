"""What processes really send to each other: counted where torch.distributed is asked to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.features import Feature
from embtab.fused import Optimizer
from embtab.planning import plan
from embtab.sharding.strategy import shard
from embtab.tables import EmbeddingBagCollection, EmbeddingCollection


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the bytes that this process sends to others, by collective; reductions as rings.

    DistributedDataParallel, which does not come by here, is not counted.
    """
    sent: Counter[str] = Counter()
    rules: dict[str, Callable[..., float]] = {
        "all_to_all_single": _all_to_all,
        "reduce_scatter_tensor": lambda output, input, **_: _bytes(input) * _others() / _world(),
        "all_gather_into_tensor": lambda output, input, **_: _bytes(input) * _others(),
        "all_gather": lambda tensors, tensor, **_: _bytes(tensor) * _others(),
        "all_reduce": lambda tensor, *_, **__: 2 * _bytes(tensor) * _others() / _world(),
    }
    originals = {name: getattr(dist, name) for name in rules}

    def watching(name: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            named = {"output_tensor": "output", "input_tensor": "input"}
            rename = {named.get(key, key): value for key, value in options.items()}
            sent[name] += round(rules[name](*arguments, **rename))
            return originals[name](*arguments, **options)

        return watched

    for name in rules:
        setattr(dist, name, watching(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _all_to_all(output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, **_: Any) -> float:  # type: ignore[no-untyped-def]
    own = input_split_sizes[dist.get_rank()] if input_split_sizes else len(input) // _world()
    return _bytes(input) - _bytes(input[:own])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _world() -> int:
    return dist.get_world_size()


def _others() -> int:
    return dist.get_world_size() - 1


def measured(kind: str, features: int, batch: int, ids: int, width: int, rows: int, pooled: bool = True) -> int:
    """The bytes that all processes together send in one step of training dense tables; called by all of them.

    Args:
        kind: one of `placement.KINDS`.
        features: each with a table of its own.
        batch: bags a process; batch * ids and rows are multiples of one another and of the number of processes, so
            that ids can be spread evenly.
        ids: of every bag.
        width: of the tables.
        rows: of each table.
        pooled: whether the lookup sums bags.
    """
    kinds = {True: "sum", False: "none"}
    planned = plan([Feature(f"f{i}", rows, kinds[pooled]) for i in range(features)], "dense", dim=width)
    made = EmbeddingBagCollection if pooled else EmbeddingCollection
    tables = made(planned, optimizer=Optimizer("sgd"))
    shard(tables, kind, torch.device("cpu"))
    values = (torch.arange(batch * ids) * max(rows // (batch * ids), 1) % rows).repeat(features)
    lengths = torch.full((features * batch,), ids)
    with counted() as sent:
        answer = tables(KeyedJaggedTensor(list(planned.encodings), values, lengths=lengths))
        found = [answer.values()] if pooled else [each.values() for each in answer.values()]
        torch.cat(found, 1).sum().backward()
    everyone = torch.tensor(sum(sent.values()))
    dist.all_reduce(everyone)
    return int(everyone)
