"""An ONNX program without what no runtime reads: where it was made, and what nothing of it uses.

The exporter notes of every node the lines of Python that it comes from, with their paths, a third of a small file. It
also leaves the constants that folding has used up, and shapes of its own between nodes that contradict those which
runtimes work out; ONNX Runtime warns of each at every load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxscript import ir


def tidy(model: ir.Model) -> None:
    """Takes it out, in place; inputs and outputs keep their names, types and shapes."""
    graph = model.graph
    _forget(model)
    _forget(graph)
    kept = {*graph.inputs, *graph.outputs}  # what a caller gives and gets
    for node in graph.all_nodes():
        _forget(node)
        for value in node.outputs:
            _forget(value)
            if value not in kept:
                value.type = value.shape = None
    for value in (*graph.inputs, *graph.initializers.values()):
        _forget(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in kept:
            del graph.initializers[name]


def _forget(part: ir.Model | ir.Graph | ir.Node | ir.Value) -> None:
    part.doc_string = None
    part.metadata_props.clear()
