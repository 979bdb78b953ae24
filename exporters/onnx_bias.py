"""A repair of what torch's exporter writes for 3-D convolutions without a bias.

It gives them a bias of zeros, O×2 of them where the operator wants O (onnxscript 0.7, ``aten_conv3d``), which
onnxruntime refuses when the model is run. A bias of zeros is none, and ONNX leaves it out.
"""

from __future__ import annotations

import onnx

from exporters.onnx_lowering import drop_unused

_AXES_OF_3D = 5


def drop_made_biases(model: onnx.ModelProto) -> None:
    """Take away, in place, the biases of 3-D convolutions that are no weights but made in the graph by expansion."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    axes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    changed = False
    for node in model.graph.node:
        if node.op_type != "Conv" or len(node.input) != 3 or axes.get(node.input[1]) != _AXES_OF_3D:
            continue
        if makers.get(node.input[2]) == "Expand":
            del node.input[2]
            changed = True
    if changed:
        drop_unused(model.graph)
