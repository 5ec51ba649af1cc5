"""A program with a graph of its own for requests of one row, beside the one for any number.

At one row a compiled request is mostly the runtime at work: it allocates what lies between kernels, and calls a library
for products that take less time than the call. Where the length is known to be one, products are sums like others, and
all of it is one kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic
from torch.utils._pytree import tree_unflatten

from embtab.serving.capture import lengths_of

SUMMED = 1 << 17  # numbers of a matrix up to which sums are quicker than the library's product
PACKED = 1 << 20  # bytes of a constant up to which it shares an array with others
ALIGNED = 64  # bytes


def is_by_row(program: ExportedProgram) -> bool:
    """Whether the first length of every input is the number of rows."""
    return len({str(length) for length in lengths_of(program)}) == 1


def beside(more: ExportedProgram, one: ExportedProgram, example: Mapping[str, Tensor]) -> ExportedProgram:
    """One program that runs `one` where its inputs have one row, else `more`.

    Args:
        more: a module as `captured` gives it.
        one: the same module, captured with one row; changed here.
        example: what `more` was captured with.
    """
    _sum_products(one.graph)
    for program in (one, more):
        program.graph_module.recompile()
    lengths = {name: {0: torch.export.Dim.AUTO} for name in example}
    # Else torch takes it for granted that a length is never one, since that of the example is not.
    with torch.no_grad(), symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(_Either(one, more), (dict(example),), dynamic_shapes=(lengths,), strict=False)


def _sum_products(graph: torch.fx.Graph) -> None:
    """Has products of one vector with a small matrix written out."""
    aten = torch.ops.aten
    for node in [node for node in graph.nodes if node.target == aten.linear.default]:
        values, matrix, *bias = node.args
        size = matrix.meta["val"].shape
        if values.meta["val"].numel() != size[1] or size.numel() > SUMMED:
            continue
        with graph.inserting_before(node):
            made = graph.call_function(aten.mul.Tensor, (values, matrix))
            made = graph.call_function(aten.sum.dim_IntList, (made, [-1]))
            if bias and bias[0] is not None:
                made = graph.call_function(aten.add.Tensor, (made, bias[0]))
            made = graph.call_function(aten.view.default, (made, list(node.meta["val"].shape)))
        node.replace_all_uses_with(made)
        graph.erase_node(node)


@dataclass(frozen=True)
class _Place:
    """Where a constant is: a buffer, or a part of one."""

    buffer: str
    first: int
    shape: torch.Size


class _Either(nn.Module):
    """Two programs of one module as the branches of a condition.

    A branch makes a handle of each thing that it is given, which takes as long as a small product: so small constants
    come together, in an array a dtype.
    """

    def __init__(self, one: ExportedProgram, more: ExportedProgram) -> None:
        super().__init__()
        self.one, self.more = (_Branch(program) for program in (one, more))
        places: dict[object, _Place] = {}
        packs: dict[str, list[Tensor]] = defaultdict(list)
        for branch in (self.one, self.more):
            for name, value in branch.constants.items():
                key = (value.data_ptr(), value.dtype, value.shape, value.stride())
                if key not in places:
                    places[key] = self._placed(name, value.detach(), packs)
                branch.places[name] = places[key]
        for name, parts in packs.items():
            self.register_buffer(name, torch.cat(parts))

    def _placed(self, name: str, value: Tensor, packs: dict[str, list[Tensor]]) -> _Place:
        if value.nbytes > PACKED:
            self.register_buffer(name, value)
            return _Place(name, 0, value.shape)
        pack = f"packed_{str(value.dtype).removeprefix('torch.')}"
        place = _Place(pack, sum(map(len, packs[pack])), value.shape)
        flat = value.flatten()
        packs[pack].append(nn.functional.pad(flat, (0, -len(flat) % (ALIGNED // flat.element_size()))))
        return place

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As of the module."""
        held = dict(self.named_buffers())
        given = list(inputs.values())

        def of_one(*operands: Tensor) -> tuple[Tensor, ...]:
            rows = operands[0].shape[0]
            first = [operand.narrow(0, 0, 1) for operand in operands[: len(given)]]
            found = self.one.run(first, dict(zip(held, operands[len(given) :], strict=True)))
            # Both branches must agree on shapes: one row is `rows` here, also where a model has squeezed it away.
            alone = [_owned(each.reshape(1, *rest)) for each, rest in zip(found, self.more.rests(), strict=True)]
            return tuple(each.as_strided((rows, *each.shape[1:]), each.stride()) for each in alone)

        def of_more(*operands: Tensor) -> tuple[Tensor, ...]:
            found = self.more.run(operands[: len(given)], dict(zip(held, operands[len(given) :], strict=True)))
            return tuple(map(_owned, found))

        found = torch.ops.higher_order.cond(given[0].shape[0] == 1, of_one, of_more, (*given, *held.values()))
        named: dict[str, Tensor] = tree_unflatten(found, self.more.program.call_spec.out_spec)
        return named


class _Branch:
    """A program, its constants by the names of its placeholders, and where they are."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        held = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        self.constants = {spec.arg.name: held[spec.target] for spec in specs if spec.target is not None}
        self.places: dict[str, _Place] = {}

    def rests(self) -> list[torch.Size]:
        """The shapes of the outputs but for the first length."""
        (made,) = self.program.graph.output_node().args
        return [node.meta["val"].shape[1:] for node in made]

    def run(self, given: Iterable[Tensor], buffers: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs in order."""
        left, args = iter(given), []
        for spec in self.program.graph_signature.input_specs:
            if spec.target is None:
                args.append(next(left))
                continue
            place = self.places[spec.arg.name]
            buffer, size = buffers[place.buffer], place.shape.numel()
            args.append(
                buffer if buffer.shape == place.shape else buffer.narrow(0, place.first, size).view(place.shape)
            )
        found: tuple[Tensor, ...] = self.program.graph_module(*args)
        return found


def _owned(values: Tensor) -> Tensor:
    """Values that are no view of something given, one row after the other."""
    return values.clone(memory_format=torch.contiguous_format)
