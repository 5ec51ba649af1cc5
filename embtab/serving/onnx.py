"""ONNX, by the exporter that captures programs with torch.export (the older one is silently wrong: it makes divisions
of shifts, and half of all ids would read another row).

Needs `pip install embtab[onnx]`. Weights above `MAX_INSIDE` go to a file of their own beside model.onnx, which may be
larger than the 2 GB that an ONNX file can hold.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embtab.errors import UserError
from embtab.serving.capture import captured
from embtab.serving.tidy import tidy
from embtab.serving.unsigned import widen

if TYPE_CHECKING:
    from embtab.serving.exported import Arrays, Run
    from embtab.serving.ranker import Ranker
    from embtab.serving.tables import ServedTables

FILE = "model.onnx"
OPSET = 20
MAX_INSIDE = 1_000_000_000  # bytes of weights


def _missing() -> UserError:
    return UserError("ONNX needs the packages onnx, onnxscript and onnxruntime; install embtab[onnx]")


def write(module: ServedTables | Ranker, example: Mapping[str, Tensor], path: Path) -> None:
    """Writes the module as ONNX, every input's first length left open.

    Raises:
        UserError: when packages are missing, or the module cannot be exported.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise _missing() from None
    program = captured(module, example)
    _named_shifts(program)
    program.example_inputs = None  # else torch writes checks of the inputs by name, which quotes in a name break
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={
                    torch.ops.aten.sort.stable: _stable_sort,
                    torch.ops.aten.floor_divide.default: _floor_divide,
                    torch.ops.embtab.logical_right_shift.default: _logical_right_shift,
                    torch.ops.embtab.in_memory.default: _identity,
                },
                input_names=module.inputs(),
                output_names=module.outputs(),
            )
        except Exception as error:  # the exporter has many
            raise UserError(f"the model cannot be exported to ONNX: {_reason(error)}") from None
        assert made is not None
        widen(made.model.graph)
        tidy(made.model)
        made.save(path, external_data=size > MAX_INSIDE)


@torch.library.custom_op("embtab::logical_right_shift", mutates_args=())
def logical_right_shift(values: Tensor, by: int) -> Tensor:
    """Shifts int64 patterns to the right and fills up with zeros; for exported programs only."""
    return (values >> by) & ((1 << (64 - by)) - 1)


@logical_right_shift.register_fake
def _(values: Tensor, by: int) -> Tensor:
    return torch.empty_like(values)


def _named_shifts(program: torch.export.ExportedProgram) -> None:
    """Calls shifts by a tensor what the exporter knows them as; it takes only one of torch's two names for each.

    ONNX has shifts of unsigned numbers only: a signed one takes seven nodes, and where a mask cuts off what the sign
    would fill in, as in every hash, three do.
    """
    aten = torch.ops.aten
    known = {
        aten.__rshift__.Tensor: aten.bitwise_right_shift.Tensor,
        aten.__lshift__.Tensor: aten.bitwise_left_shift.Tensor,
    }
    for node in program.graph.nodes:
        if node.target == aten.__rshift__.Scalar and _sign_is_cut_off(node):
            node.target = torch.ops.embtab.logical_right_shift.default
            for mask in [user for user in node.users if user.args[1] == (1 << (64 - node.args[1])) - 1]:
                mask.replace_all_uses_with(node)  # nothing else is left to cut off
                program.graph_module.graph.erase_node(mask)
        node.target = known.get(node.target, node.target)
    program.graph_module.recompile()


def _sign_is_cut_off(shift: torch.fx.Node) -> bool:
    """Whether all that reads a shift of int64 is a mask without the bits that are filled in."""
    values, by = shift.args
    masks = {torch.ops.aten.bitwise_and.Scalar, torch.ops.aten.__and__.Scalar}
    return values.meta["val"].dtype == torch.int64 and all(  # type: ignore[union-attr]
        user.target in masks and 0 <= user.args[1] < 1 << (64 - by)  # type: ignore[operator]
        for user in shift.users
    )


def _logical_right_shift(values: Any, by: int) -> Any:
    """The same in ONNX."""
    import onnx
    from onnxscript import opset20

    op: Any = opset20
    unsigned = op.Cast(values, to=onnx.TensorProto.UINT64)
    distance = op.Cast(op.Constant(value_int=by), to=onnx.TensorProto.UINT64)
    return op.Cast(op.BitShift(unsigned, distance, direction="RIGHT"), to=onnx.TensorProto.INT64)


def _identity(values: Any) -> Any:
    """Runtimes write down every value."""
    from onnxscript import opset20

    op: Any = opset20
    return op.Identity(values)


def _floor_divide(values: Any, by: Any) -> Any:
    """A division rounded down, of whole numbers by what is left without the remainder: three nodes instead of eight."""
    from onnxscript import opset20

    op: Any = opset20
    if values.dtype is not None and values.dtype.is_floating_point():
        return op.Floor(op.Div(values, by))
    return op.Div(op.Sub(values, op.Mod(values, by)), by)


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """A sort that the exporter lacks: TopK of everything, which by ONNX's definition keeps the order of equals."""
    from onnxscript import opset20

    op: Any = opset20
    length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    ordered: tuple[Any, Any] = op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)
    return ordered


def _reason(error: BaseException) -> str:
    """The message of the first error, in one line; the exporter's own are advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def load(path: Path) -> Run:
    """The program under ONNX Runtime, on the CPU and one thread.

    Raises:
        UserError: when ONNX Runtime is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise _missing() from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {entry.name for entry in session.get_inputs()}

    def run(inputs: Arrays) -> Arrays:
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items() if name in taken}
        return dict(zip(names, session.run(None, given), strict=True))

    return run
