"""ONNX files, described by the onnx library; onnxruntime's own format and adapters, by onnxruntime's readers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from exporters.inspection import Model, Node, Port, counted_parameters
from exporters.run_onnx import LOAD_ERRORS, OnnxRuntime
from keys.errors import InputError

T = TypeVar("T")
# What damaged messages and tables make their readers raise; none of it may reach a user.
_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error, MemoryError)

_ORT_TYPES: dict[str, str] = {"float": "float32", "double": "float64"}


def read_onnx(path: Path, data: bytes) -> Model:
    """Describe an ONNX file. Raises :class:`InputError` if it is damaged or keeps weights in another file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        message: Any = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise _damaged(path, "it is not an ONNX model") from error
    if not message.HasField("graph") or not message.graph.node:
        raise _damaged(path, "it holds no graph")
    return _parsed(path, lambda: _onnx_model(path, message, len(data)))


def _onnx_model(path: Path, message: Any, size: int) -> Model:
    from onnx import TensorProto, numpy_helper

    graph = message.graph
    tensors: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise InputError(f"{path} keeps its weights in another file; export it again as one file.")
        tensors[_text(tensor.name)] = numpy_helper.to_array(tensor)
    weight_bytes = sum(len(tensor.raw_data) for tensor in graph.initializer)
    nodes: list[Node] = []
    for node in graph.node:
        wiring = node.SerializeToString(deterministic=True)
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if node.op_type == "Constant" and values:
            # A tensor like any other: the graph is the same whatever it holds.
            tensors[_text(node.output[0])] = numpy_helper.to_array(values[0])
            wiring = node.output[0].encode()
        domain, kind = _text(node.domain), _text(node.op_type)
        nodes.append(Node(f"{domain}.{kind}" if domain else kind, wiring))
    opsets = {_text(entry.domain) or "ai.onnx": entry.version for entry in message.opset_import}
    return Model(
        path=path, kind="ONNX",
        inputs=tuple(_onnx_port(value) for value in graph.input if value.name not in tensors),
        outputs=tuple(_onnx_port(value) for value in graph.output),
        nodes=tuple(nodes), tensors=tensors,
        versions={f"opset {domain}": str(version) for domain, version in opsets.items()}
        | {"IR version": str(message.ir_version)},
        metadata={_text(entry.key): _text(entry.value) for entry in message.metadata_props},
        graph_bytes=size - weight_bytes, weight_bytes=weight_bytes, parameters=counted_parameters(tensors),
    )  # fmt: skip


def _onnx_port(value: Any) -> Port:
    from onnx import helper

    tensor = value.type.tensor_type
    sides = [
        _text(side.dim_param) or (side.dim_value if side.HasField("dim_value") else "?") for side in tensor.shape.dim
    ]
    return Port(_text(value.name), str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), tuple(sides))


def _text(value: str | bytes) -> str:
    """A field of text; what is not UTF-8 comes as bytes, and is damage."""
    if isinstance(value, bytes):
        raise ValueError("a text is not UTF-8")
    return value


def read_ort(path: Path, data: bytes) -> Model:
    """Describe a file in onnxruntime's own format. Raises :class:`InputError` if it is damaged."""
    if data[4:8] != b"ORTM":
        raise _damaged(path, "it is not in onnxruntime's own format")
    # Its reader checks every offset first; the tables below are then read by their offsets.
    session: Any = OnnxRuntime(data).session
    return _parsed(path, lambda: _ort_model(path, data, session))


def _ort_model(path: Path, data: bytes, session: Any) -> Model:
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    root: Any = InferenceSession
    file = root.GetRootAs(data, 0)
    model = file.Model()
    graph = model.Graph()
    tensors = {
        tensor.Name().decode(): _ort_values(tensor)
        for tensor in (graph.Initializers(index) for index in range(graph.InitializersLength()))
    }
    weight_bytes = sum(values.nbytes for values in tensors.values())
    opsets = [model.OpsetImport(index) for index in range(model.OpsetImportLength())]
    used = {node.Domain() for node in (graph.Nodes(index) for index in range(graph.NodesLength()))}
    metadata = session.get_modelmeta().custom_metadata_map
    return Model(
        path=path, kind="ORT",
        inputs=tuple(_ort_port(value) for value in session.get_inputs()),
        outputs=tuple(_ort_port(value) for value in session.get_outputs()),
        nodes=tuple(_ort_node(graph.Nodes(index)) for index in range(graph.NodesLength())), tensors=tensors,
        versions={
            f"opset {entry.Domain().decode() or 'ai.onnx'}": str(entry.Version())
            for entry in opsets
            if entry.Domain() in used
        } | {"ORT format version": file.OrtVersion().decode()},
        metadata=dict(sorted(metadata.items())),
        graph_bytes=len(data) - weight_bytes, weight_bytes=weight_bytes, parameters=counted_parameters(tensors),
    )  # fmt: skip


def read_adapter(path: Path) -> Model:
    """Describe an adapter in onnxruntime's format. Raises :class:`InputError` if it is damaged."""
    import onnxruntime

    reader: Any = onnxruntime.AdapterFormat
    try:
        adapter = reader.read_adapter(str(path))
        # Copies: what onnxruntime hands out lies in the adapter's own memory.
        tensors = {str(name): np.array(value.numpy()) for name, value in sorted(adapter.get_parameters().items())}
    except (*LOAD_ERRORS, *_FAULTS, RuntimeError) as error:
        raise _damaged(path, "onnxruntime cannot read it as an adapter") from error
    size = sum(values.nbytes for values in tensors.values())
    return Model(
        path=path, kind="ONNX adapter", inputs=(), outputs=(), nodes=(), tensors=tensors,
        versions={"adapter format version": str(adapter.get_format_version())}, metadata={},
        graph_bytes=path.stat().st_size - size, weight_bytes=size, parameters=counted_parameters(tensors),
    )  # fmt: skip


def _ort_values(tensor: Any) -> np.ndarray:
    from onnx import helper

    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.DataType()))
    shape = [tensor.Dims(index) for index in range(tensor.DimsLength())]
    raw = tensor.RawDataAsNumpy() if tensor.RawDataLength() else np.zeros(0, np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


def _ort_node(node: Any) -> Node:
    """Attributes are compared by number and name: their values lie in nested tables."""
    domain, kind = node.Domain().decode(), node.OpType().decode()
    parts = [kind, node.SinceVersion()]
    parts += [[node.Inputs(index) for index in range(node.InputsLength())]]
    parts += [[node.Outputs(index) for index in range(node.OutputsLength())]]
    attributes = (node.Attributes(index) for index in range(node.AttributesLength()))
    parts += [
        [(a.Name(), a.Type(), a.I(), a.F(), a.S(), [a.Ints(i) for i in range(a.IntsLength())]) for a in attributes]
    ]
    return Node(f"{domain}.{kind}" if domain else kind, repr(parts).encode())


def _ort_port(value: Any) -> Port:
    kind: str = value.type.removeprefix("tensor(").removesuffix(")")
    sides = tuple("?" if side is None else side for side in value.shape)
    return Port(value.name, _ORT_TYPES.get(kind, kind), sides)


def _parsed(path: Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except _FAULTS as error:
        raise _damaged(path, "its tables do not fit together") from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged: {reason}; export the model again.")
