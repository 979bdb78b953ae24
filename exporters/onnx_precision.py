"""Other precisions of an ONNX file that :mod:`exporters.to_onnx` wrote: bytes in, bytes out, the same each time.

* fp16: matrices are stored as float16 and cast to float32 when the session is made; vectors stay float32. Half the
  file, the same speed and float32 arithmetic: CPUs run few operators in float16.
* int8: onnxruntime's dynamic quantisation. Weights of all products with a constant matrix are signed 8-bit with one
  scale per output channel; activations are quantised as they come.
* int8, static: onnxruntime's QDQ form. The same weights; the range of every activation is fixed beforehand from
  images, which pass through the keyed model itself.

Shapes do not depend on the values of weights, so that a file can serve as a template
(:mod:`exporters.template`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.checks import check_float16
from exporters.quiet import quiet
from exporters.runtime import batches

SUFFIX_FP16 = ".fp16"
_CALIBRATION_BATCH = 8


def to_fp16(data: bytes) -> bytes:
    """Store every float32 initializer of two or more axes as float16, and cast it back in the graph.

    Raises :class:`InputError` naming the first tensor with a value beyond float16's range.
    """
    model = onnx.load_from_string(data)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(as_float16(values, name), name + SUFFIX_FP16))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString(deterministic=True)


def as_float16(values: np.ndarray, name: str) -> np.ndarray:
    """float32 ``values`` to the nearest float16. Raises :class:`InputError` naming a tensor that overflows."""
    check_float16(name, float(np.abs(values).max(initial=0.0)))
    return values.astype(np.float16)


def to_int8(data: bytes) -> bytes:
    """Quantise dynamically: weights to int8 per output channel, activations to uint8 as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def quantise(model: onnx.ModelProto, output: Path) -> None:
        quantize_dynamic(
            model, output, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip

    return _quantised(data, quantise)


def to_int8_static(data: bytes, images: np.ndarray) -> bytes:
    """Quantise to QDQ form: weights as in :func:`to_int8`, activations by their range on ``images``.

    ``images``: float32 N×C×H×W in [0, 1], as the model takes them; a few dozen of the kind that devices will see.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    fixed = onnx.load_from_string(data).graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = fixed or _CALIBRATION_BATCH

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = batches(images, size)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            part = next(self._batches, None)
            return None if part is None else {"image": part}

    def quantise(model: onnx.ModelProto, output: Path) -> None:
        quantize_static(
            model, output, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"],
            calibrate_method=CalibrationMethod.MinMax,
            # Products are left as they come: their sums with biases are what has a range worth fixing.
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )  # fmt: skip

    return _quantised(data, quantise)


def _quantised(data: bytes, quantise: Callable[[onnx.ModelProto, Path], Any]) -> bytes:
    model = _with_plain_products(onnx.load_from_string(data))
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as folder, quiet():
        output = Path(folder) / "quantised.onnx"
        quantise(model, output)
        result = onnx.load(str(output))
    for tensor in result.graph.initializer:
        # Some are written as lists of numbers; bytes have one length for every value.
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    return result.SerializeToString(deterministic=True)


def _with_plain_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every constant matrix as the second factor of a ``MatMul``, as onnxruntime quantises them.

    A ``Transpose`` of an initializer is done here once, and a ``Gemm`` becomes a product and a sum.
    """
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Transpose" and node.input[0] in initializers:
            _transpose(initializers[node.input[0]], attributes["perm"])
            renamed[node.output[0]] = node.input[0]
        elif node.op_type == "Gemm" and node.input[1] in initializers and len(node.input) == 3:
            if attributes.get("transB"):
                _transpose(initializers[node.input[1]], (1, 0))
            product = f"{node.output[0]}.product"
            nodes.append(helper.make_node("MatMul", list(node.input[:2]), [product], name=f"{node.name}.product"))
            nodes.append(helper.make_node("Add", [product, node.input[2]], list(node.output), name=node.name))
        else:
            nodes.append(node)
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # some of these shapes were turned round
    return model


def _transpose(tensor: onnx.TensorProto, axes: Any) -> None:
    values = numpy_helper.to_array(tensor).transpose(axes)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
