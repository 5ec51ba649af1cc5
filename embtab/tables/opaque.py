"""Collections inside `torch.compile`: what a batch is answered with is one operator, which no compiler looks into.

How a batch is computed depends on its ids (checks, distinct ids, kernels with an optimizer inside), and no graph can
hold that; so the operator runs a collection as it runs without a compiler, and all around it may be one graph.

    ids, lengths, weights, parameters --embtab::vectors--> vectors [B, F, D], ticket
    gradient of the vectors, ticket --embtab::gradients--> gradients of the parameters, fused tables stepped

A ticket leads from the one to the other: what autograd has noted in the first goes when the ticket's memory does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.tables.batch import check_form

if TYPE_CHECKING:
    from embtab.tables.base import Collection

_numbers, _tickets = count(), count()
_collections: weakref.WeakValueDictionary[int, Collection] = weakref.WeakValueDictionary()
_noted: dict[int, _Noted] = {}
_KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
_HOOK = torch.zeros(0, requires_grad=True)
"""Makes autograd ask for gradients where only fused tables train; its own is empty."""


class _Noted(NamedTuple):
    """Vectors, and what they were computed from: the leaves of autograd's graph."""

    vectors: Tensor
    leaves: list[Tensor]
    lookup: Any


def numbered(collection: Collection) -> int:
    """The number by which the operator finds a collection; a graph can hold it."""
    number = next(_numbers)
    _collections[number] = collection
    return number


def traced_vectors(collection: Collection, number: int, batch: KeyedJaggedTensor) -> Tensor:
    """[B, F, D] of a batch, while a compiler traces.

    Args:
        collection: whose vectors.
        number: of the collection, see `numbered`.
        batch: ids of at least the plan's features.
    """
    check_form(batch)
    weights, given = batch.weights_or_none(), [_HOOK, *_trained(collection).values()]
    grads = torch.is_grad_enabled()
    answer: tuple[Tensor, Tensor] = torch.ops.embtab.vectors(
        number, batch.keys(), batch.stride(), batch.values(), batch.lengths(), weights, given, grads
    )
    return answer[0]


def _trained(collection: Collection) -> dict[str, Tensor]:
    """The parameters whose gradients backward gives, by name: fused tables have none."""
    fused = collection.lookup.fused is not None
    named = collection.named_parameters()
    return {name: each for name, each in named if each.requires_grad and not (fused and name.startswith("lookup."))}


@contextmanager
def _as_ever() -> Iterator[None]:
    """Lets autograd take note again, which operators are shielded from."""
    with torch._C._ForceDispatchKeyGuard(*_KEYS):
        yield


@torch.library.custom_op(
    "embtab::vectors",
    mutates_args=(),
    schema="(int number, str[] keys, SymInt stride, Tensor ids, Tensor lengths, Tensor? weights, Tensor[] given, "
    "bool grads) -> (Tensor, Tensor)",
)
def _vectors(
    number: int,
    keys: list[str],
    stride: int,
    ids: Tensor,
    lengths: Tensor,
    weights: Tensor | None,
    given: Sequence[Tensor],
    grads: bool,
) -> tuple[Tensor, Tensor]:
    collection = _collections[number]
    with _as_ever(), torch.set_grad_enabled(grads):
        of_weights = [] if weights is None else [weights.detach().requires_grad_(grads and weights.is_floating_point())]
        leaves = [each.detach().requires_grad_(grads) for each in given[1:]]
        batch = KeyedJaggedTensor(keys, ids, *of_weights, lengths=lengths, stride=stride)
        named = dict(zip(_trained(collection), leaves, strict=True))
        vectors = torch.func.functional_call(collection, named, (batch,)).values()
        ticket = torch.tensor([next(_tickets)])
        if vectors.requires_grad:
            _keep(ticket, _Noted(vectors, [*of_weights, *leaves], collection.lookup))
    return vectors.detach().view(stride, len(collection.names), collection.plan.dim).clone(), ticket


def _keep(ticket: Tensor, noted: _Noted) -> None:
    number = int(ticket)
    _noted[number] = noted
    weakref.finalize(ticket.untyped_storage(), _noted.pop, number, None)


@_vectors.register_fake
def _(number: int, keys: list[str], stride: int, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    collection = _collections[number]
    kind = next((each.dtype for each in collection.parameters()), torch.float32)
    shape = (stride, len(collection.names), collection.plan.dim)
    return ids.new_empty(shape, dtype=kind), torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("embtab::gradients", mutates_args=())
def _gradients(ticket: Tensor, gradient: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    noted = _noted.get(int(ticket))
    if noted is None:  # nothing of it is trained
        return [torch.zeros_like(each) for each in like]
    with _as_ever(), torch.enable_grad():
        noted.lookup.join_pass()
        noted.vectors.backward(gradient.flatten(1), retain_graph=True)
        # Clones: gradients of tables that lie side by side are views of one.
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in noted.leaves]
        for leaf in noted.leaves:
            leaf.grad = None
        return [torch.zeros(0), *found]


@_gradients.register_fake
def _(ticket: Tensor, gradient: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(each) for each in like]


def _note(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, (hook, *trained) = inputs[5], inputs[6]
    ctx.weighted = weights is not None
    ctx.save_for_backward(output[1], hook, *([weights] if ctx.weighted else []), *trained)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    ticket, *like = ctx.saved_tensors
    # Also the hook's comes from the operator: a compiler leaves out what nothing is made of.
    hook, *found = torch.ops.embtab.gradients(ticket, gradient, like)
    weights = [found.pop(0)] if ctx.weighted else [None]
    return None, None, None, None, None, *weights, [hook, *found], None


_vectors.register_autograd(_backward, setup_context=_note)
