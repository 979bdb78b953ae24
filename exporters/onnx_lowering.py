"""ONNX models of operator set 18, the oldest that torch's exporter writes, as models of operator set 17.

Between the two, what exported ViTs use changed its form and not its meaning: ``Split`` got the attribute
``num_outputs`` (17 splits into as many equal parts as there are outputs), and the reductions take their axes as an
input, where 17 has an attribute.
"""

from __future__ import annotations

import numpy as np
import onnx

from keys.errors import InputError

_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_KEEPS_VALUES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
# Changed or new in 18, and not among what is rewritten here.
_NEWER = frozenset({
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "GroupNormalization", "LpPool",
    "Mish", "OptionalGetElement", "OptionalHasElement", "Pad", "Resize", "ScatterElements", "ScatterND",
})  # fmt: skip


def lower_to_17(model: onnx.ModelProto) -> None:
    """Rewrite ``model`` (operator set 18, no functions, no sub-graphs) in place.

    Raises :class:`InputError` naming the first operator that 17 cannot express.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Split":
            _remove_attribute(node, "num_outputs")
        elif node.op_type in _REDUCTIONS:
            _axes_to_attribute(node, makers)
        elif node.op_type in _NEWER:
            raise InputError(
                f"This model cannot be expressed in ONNX opset 17: its operator {node.op_type!r} needs 18; "
                "choose opset 18 or newer."
            )
    drop_unused(graph)
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = 17


def _axes_to_attribute(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> None:
    if len(node.input) < 2 or not node.input[1]:
        return
    maker = makers.get(node.input[1])
    # The exporter writes a list of axes as a constant that it then gives the shape of a list.
    while maker is not None and maker.op_type in _KEEPS_VALUES:
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type != "Constant":
        raise InputError(
            f"This model cannot be expressed in ONNX opset 17: the axes of {node.op_type!r} are computed; "
            "choose opset 18 or newer."
        )
    value = onnx.helper.get_node_attr_value(maker, maker.attribute[0].name)
    axes = np.ravel(onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value)
    del node.input[1]
    _remove_attribute(node, "noop_with_empty_axes")
    node.attribute.append(onnx.helper.make_attribute("axes", [int(axis) for axis in axes]))


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the operators whose results nothing needs."""
    used = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _remove_attribute(node: onnx.NodeProto, name: str) -> None:
    for attribute in [found for found in node.attribute if found.name == name]:
        node.attribute.remove(attribute)
