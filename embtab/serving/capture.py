"""A module as a torch.export program whose batch is of any size."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embtab.errors import UserError

if TYPE_CHECKING:
    from embtab.serving.ranker import Ranker
    from embtab.serving.tables import ServedTables


_capturing = ContextVar("capturing", default=False)


@torch.library.custom_op("embtab::in_memory", mutates_args=())
def _in_memory(values: Tensor) -> Tensor:
    return values.clone()


@_in_memory.register_fake
def _(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def in_memory(values: Tensor) -> Tensor:
    """The values, marked in a program that is captured as worth writing down before they are read.

    A compiler that fuses all it can computes rows in the loop that reads them, anew for each number of a vector, and
    reads number by number where vectors become part of something longer.

    Args:
        values: [B, ...]; only the first length may be left open.
    """
    marked: Tensor = torch.ops.embtab.in_memory(values) if _capturing.get() else values
    return marked


def captured(
    module: ServedTables | Ranker, example: Mapping[str, Tensor], fixed: bool = False
) -> torch.export.ExportedProgram:
    """The module with the first length of every input left open.

    Args:
        module: tables or a ranker.
        example: inputs of at least two rows.
        fixed: the lengths are to be those of `example`, which may then have one row.

    Raises:
        UserError: when the model does what depends on more than the shapes of its inputs.
    """
    lengths = None if fixed else ({name: {0: torch.export.Dim.AUTO} for name in example},)
    before = _capturing.set(True)
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (dict(example),), dynamic_shapes=lengths, strict=False)
    except Exception as error:  # torch.export has many
        name = type(getattr(module, "model", module)).__name__
        raise UserError(f"{name} cannot be exported: {' '.join(str(error).split())[:300]}") from None
    finally:
        _capturing.reset(before)
    for length, name in zip(lengths_of(program), module.inputs(), strict=True):
        if isinstance(length, int) and not fixed:
            raise UserError(f"{type(module).__name__} cannot be exported: it fixes the length of input {name!r}")
    return program


def lengths_of(program: torch.export.ExportedProgram) -> list[int | torch.SymInt]:
    """The first length of every input."""
    given = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    return [node.meta["val"].shape[0] for node in nodes]
