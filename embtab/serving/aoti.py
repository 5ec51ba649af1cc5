"""AOTInductor packages: the program compiled to machine code for this kind of processor, loaded without tracing.

A .pt2 is code that runs in the process that loads it. It needs the torch version it was made with, and a compiler only
where it is made.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import treespec_loads

from embtab.errors import UserError
from embtab.files import scratch
from embtab.serving import one_row
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

    from embtab.serving.guarded import checked

    program = captured(module, example)
    _put_in_memory(program.graph)
    one = None
    if one_row.is_by_row(program):
        one = captured(module, {name: values[:1] for name, values in example.items()}, fixed=True)
        _unmark(one.graph)
    # Inductor keeps what it compiles for the next time, and takes what a killed compiler left half written for whole:
    # so it gets a folder that goes with the process. (Not beside the output: it quotes no spaces.)
    settings = {
        "aot_inductor.precompile_headers": False,
        "cpp.enable_floating_point_contract_flag": "fast",  # products are added up as they are made
    }
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # that the folder is kept, which it is not
    try:
        with (
            scratch() as folder,
            torch._inductor.config.patch(settings),
            fresh_cache(dir=str(folder)),
            checked(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's, of its own parts
            both = program if one is None else one_row.beside(program, one, example)
            torch._inductor.aoti_compile_and_package(both, package_path=str(path))
    except Exception as error:  # inductor and the compiler have many
        raise UserError(f"the model cannot be compiled: {_reason(error)}") from error


def _put_in_memory(graph: torch.fx.Graph) -> None:
    """Has what is marked by `in_memory` written down: a view by strides is of memory."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
    for node in [node for node in graph.nodes if node.target == torch.ops.embtab.in_memory.default]:
        values, shape = node.args[0], node.meta["val"].shape
        seen = values
        while seen.target in views:
            seen = seen.args[0]
        if seen.target == aten.as_strided.default:  # marked before, and a view of it since
            node.replace_all_uses_with(values)
            graph.erase_node(node)
            continue
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        with graph.inserting_before(node):
            sizes = [graph.call_function(aten.sym_size.int, (values, 0)), *shape[1:]]
            copied = graph.call_function(aten.clone.default, (values,), {"memory_format": torch.contiguous_format})
            view = graph.call_function(aten.as_strided.default, (copied, sizes, strides))
        view.meta = dict(node.meta)  # the shape of an output is read from it
        node.replace_all_uses_with(view)
        graph.erase_node(node)


def _unmark(graph: torch.fx.Graph) -> None:
    """Has what is marked by `in_memory` computed where it is read: of one row that is quicker."""
    for node in [node for node in graph.nodes if node.target == torch.ops.embtab.in_memory.default]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _reason(error: Exception) -> str:
    """What the compiler complains of first, where it is the compiler: its command line is long, and no reason."""
    text = str(error)
    found = re.search(r"(?:fatal |internal compiler )?error: .*", text)
    return " ".join((found[0] if found else text).split())[:300]


def load(path: Path) -> Run:
    """The compiled program."""
    loader = torch._inductor.aoti_load_package(str(path)).loader
    # What wraps the loader sorts inputs and outputs by trees at every call, which takes longer than a small ranker.
    given, made = (treespec_loads(spec) for spec in loader.get_call_spec())
    taken, names = given.child(0).child(0).context, made.context

    def run(inputs: Arrays) -> Arrays:
        tensors = []
        for name in taken:
            array = inputs[name]
            if len(array) == 1:  # whose stride may be any, but is looked at
                array = array.reshape(-1).reshape(array.shape)
            tensors.append(torch.from_numpy(array if array.flags.carray else array.copy()))
        return {name: output.numpy() for name, output in zip(names, loader.boxed_run(tensors), strict=True)}

    return run
