"""Hashes in ONNX, without the way there and back at every shift.

ONNX shifts unsigned numbers only, so that each shift of an int64 is exported between two casts. Sums, products and
exclusive ors have the same bits in int64 and uint64: what lies between two shifts is done unsigned as well, and a hash
is cast once at its beginning and once at its end. Runtimes must multiply uint64: ONNX Runtime does since 1.22.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnxscript import ir

    Twins = dict[ir.Value, ir.Value]
    """Of an int64 the uint64 with the same bits."""

SAME_BITS = ("Add", "Mul", "BitwiseXor")


def widen(graph: ir.Graph) -> None:
    """Makes uint64 of every int64 sum, product and exclusive or of a number that has been shifted, in place."""
    twins: Twins = {}
    for node in list(graph):
        out = node.outputs[0]
        given = [value for value in node.inputs if value is not None]
        if out.is_graph_output():
            continue  # it has a name to keep
        if node.op_type == "Cast":
            _note(given[0], out, twins)
        elif node.op_type in SAME_BITS and _is(out, "INT64") and any(value in twins for value in given):
            unsigned = _made(graph, node, node.op_type, [_twin(graph, node, value, twins) for value in given], "UINT64")
            signed = _made(graph, node, "Cast", [unsigned], "INT64")
            out.replace_all_uses_with(signed)
            twins[signed] = unsigned
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)


def _is(value: ir.Value, dtype: str) -> bool:
    return value.dtype is not None and value.dtype.name == dtype


def _note(value: ir.Value, out: ir.Value, twins: Twins) -> None:
    """A cast between the two types: each is the other's twin, and none is cast that has one."""
    if _is(value, "INT64") and _is(out, "UINT64"):
        if value in twins:
            out.replace_all_uses_with(twins[value])
        else:
            twins[value] = out
    elif _is(value, "UINT64") and _is(out, "INT64"):
        twins[out] = value


def _twin(graph: ir.Graph, before: ir.Node, value: ir.Value, twins: Twins) -> ir.Value:
    """The uint64 with the bits of an int64."""
    if value not in twins:
        constant = value.const_value is not None
        twins[value] = _constant(graph, value) if constant else _made(graph, before, "Cast", [value], "UINT64")
    return twins[value]


def _constant(graph: ir.Graph, value: ir.Value) -> ir.Value:
    from onnxscript import ir

    assert value.const_value is not None
    array = value.const_value.numpy().view(np.uint64)
    bits = ir.tensor(array, name=f"{value.name}_unsigned")
    kind = ir.TensorType(ir.DataType.UINT64)
    made = ir.Value(name=bits.name, type=kind, shape=ir.Shape(array.shape), const_value=bits)
    graph.register_initializer(made)
    return made


def _made(graph: ir.Graph, before: ir.Node, op: str, inputs: list[ir.Value], dtype: str) -> ir.Value:
    """The output of a new node."""
    from onnxscript import ir

    kind = ir.DataType[dtype]
    node = ir.node(op, inputs, {"to": kind} if op == "Cast" else {})
    node.outputs[0].type = ir.TensorType(kind)
    node.outputs[0].shape = before.outputs[0].shape
    graph.insert_before(before, node)
    return node.outputs[0]
