"""AOTInductor packages: the program compiled to machine code for this kind of processor, loaded without tracing.

A .pt2 is code that runs in the process that loads it. It needs the torch version it was made with, and a compiler only
where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.serving.capture import captured

if TYPE_CHECKING:
    from embtab.serving.exported import Arrays, Run
    from embtab.serving.ranker import Ranker
    from embtab.serving.tables import ServedTables

FILE = "model.pt2"


def write(module: ServedTables | Ranker, example: Mapping[str, Tensor], path: Path) -> None:
    """Compiles the module.

    Raises:
        UserError: when it cannot be captured or compiled.
    """
    program = captured(module, example)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # inductor and the compiler have many
        raise UserError(f"the model cannot be compiled: {' '.join(str(error).split())[:300]}") from None


def load(path: Path) -> Run:
    """The compiled program."""
    program = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Arrays) -> Arrays:
        given = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        with torch.no_grad():
            return {name: output.numpy() for name, output in program(given).items()}

    return run
