"""AOTInductor packages: the program compiled to machine code for this kind of processor, loaded without tracing.

A .pt2 is code that runs in the process that loads it. It needs the torch version it was made with, and a compiler only
where it is made.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.files import scratch
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
    from torch._inductor.utils import fresh_cache

    program = captured(module, example)
    # Inductor keeps what it compiles for the next time, and takes what a killed compiler left half written for whole:
    # so it gets a folder that goes with the process. (Not beside the output: it quotes no spaces.)
    settings = {"aot_inductor.precompile_headers": False}
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # that the folder is kept, which it is not
    try:
        with scratch() as folder, torch._inductor.config.patch(settings), fresh_cache(dir=str(folder)):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # inductor and the compiler have many
        raise UserError(f"the model cannot be compiled: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the compiler complains of first, where it is the compiler: its command line is long, and no reason."""
    text = str(error)
    found = re.search(r"(?:fatal |internal compiler )?error: .*", text)
    return " ".join((found[0] if found else text).split())[:300]


def load(path: Path) -> Run:
    """The compiled program."""
    program = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Arrays) -> Arrays:
        given = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        with torch.no_grad():
            return {name: output.numpy() for name, output in program(given).items()}

    return run
