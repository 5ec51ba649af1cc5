"""A module as a torch.export program whose batch is of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embtab.errors import UserError

if TYPE_CHECKING:
    from embtab.serving.ranker import Ranker
    from embtab.serving.tables import ServedTables


def captured(module: ServedTables | Ranker, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The module with the first length of every input left open.

    Args:
        module: tables or a ranker.
        example: inputs of at least two rows.

    Raises:
        UserError: when the model does what depends on more than the shapes of its inputs.
    """
    lengths = {name: {0: torch.export.Dim.AUTO} for name in example}
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (dict(example),), dynamic_shapes=(lengths,), strict=False)
    except Exception as error:  # torch.export has many
        name = type(getattr(module, "model", module)).__name__
        raise UserError(f"{name} cannot be exported: {' '.join(str(error).split())[:300]}") from None
    for node, name in zip(_placeholders(program), module.inputs(), strict=True):
        if isinstance(node.meta["val"].shape[0], int):
            raise UserError(f"{type(module).__name__} cannot be exported: it fixes the length of input {name!r}")
    return program


def _placeholders(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    given = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
