"""Core ML packages, described by their specification and the reader of ML Programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporters.inspection import Model, Node, Port, counted_parameters
from exporters.mil.program import MODEL_PATH, WEIGHTS_PATH, Operation, Program, read_program
from exporters.quiet import import_coremltools
from keys.errors import InputError

# The oldest iOS that reads a specification.
_IOS = {6: "15", 7: "16", 8: "17", 9: "18"}


def read_coreml(path: Path) -> Model:
    """Describe a ``.mlpackage``. Raises :class:`InputError` if it is damaged or holds no ML Program."""
    program = read_program(path)
    specification = _specification(path)
    version = int(specification.specificationVersion)
    description = specification.description
    tensors = dict(program.constants)
    weights = path / WEIGHTS_PATH
    return Model(
        path=path, kind="Core ML",
        inputs=tuple(_port(value) for value in description.input),
        outputs=tuple(_port(value) for value in description.output),
        nodes=tuple(Node(operation.type, _wiring(operation)) for operation in program.operations), tensors=tensors,
        versions={
            "specification version": str(version),
            "oldest iOS": _IOS.get(version, f"unknown (specification {version})"),
            "operator set": str(specification.mlProgram.functions["main"].opset),
        },
        metadata=dict(sorted(description.metadata.userDefined.items())),
        graph_bytes=(path / MODEL_PATH).stat().st_size,
        weight_bytes=weights.stat().st_size if weights.is_file() else 0,
        parameters=_parameters(program),
    )  # fmt: skip


def _specification(path: Path) -> Any:
    messages = import_coremltools("coremltools.proto.Model_pb2")
    protobuf = import_coremltools("google.protobuf.message")
    try:
        return messages.Model.FromString((path / MODEL_PATH).read_bytes())
    except (OSError, protobuf.DecodeError) as error:
        raise InputError(f"{path / MODEL_PATH} is damaged or missing; export the model again.") from error


def _wiring(operation: Operation) -> bytes:
    inputs = sorted((name, tuple(names)) for name, names in operation.inputs.items())
    outputs = [
        (output.name, None if output.type is None else (str(output.type.dtype), output.type.shape))
        for output in operation.outputs
    ]
    return repr((inputs, outputs)).encode()


def _parameters(program: Program) -> int:
    """Compressed weights count as the tensor that they stand for."""
    compressed = [operation for operation in program.operations if operation.type.startswith("constexpr_")]
    parts = {name for operation in compressed for names in operation.inputs.values() for name in names}
    plain = {name: values for name, values in program.constants.items() if name not in parts}
    total = counted_parameters(plain)
    for operation in compressed:
        for output in operation.outputs:
            size = 1
            for side in output.type.shape if output.type is not None else ():
                size *= side
            total += size
    return total


def _port(value: Any) -> Port:
    kind = value.type.WhichOneof("Type")
    if kind == "imageType":
        image = value.type.imageType
        color = image.ColorSpace.Name(image.colorSpace).lower()
        return Port(value.name, f"image, {color}", (int(image.height), int(image.width)))
    if kind == "multiArrayType":
        array = value.type.multiArrayType
        return Port(value.name, array.ArrayDataType.Name(array.dataType).lower(), tuple(int(s) for s in array.shape))
    return Port(value.name, str(kind).removesuffix("Type"), ())
