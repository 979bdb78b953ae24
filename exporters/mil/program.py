"""An ML Program as frozen data: constants, operations in order, inputs and outputs.

Read with coremltools' protobuf messages (which load on every system) and :mod:`exporters.mil.weights`. All
that the evaluator needs is parsed here once; what it could not compute (several functions, unknown types,
control flow) is refused here with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.mil.weights import WeightFile, read_weight_file
from exporters.quiet import import_coremltools
from keys.errors import InputError

ITEM = "com.apple.CoreML"
MODEL_PATH = f"Data/{ITEM}/model.mlmodel"
WEIGHTS_PATH = f"Data/{ITEM}/weights/weight.bin"
_WEIGHTS_NAME = "@model_path/weights/weight.bin"

# NumPy's type of each tensor type that is read; strings are NumPy strings of any length.
_DTYPES: dict[str, np.dtype] = {
    "FLOAT16": np.dtype("<f2"),
    "FLOAT32": np.dtype("<f4"),
    "FLOAT64": np.dtype("<f8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "BOOL": np.dtype("?"),
    "STRING": np.dtype("U"),
}


@dataclass(frozen=True)
class TensorType:
    """Type and shape of a tensor as the program declares them; ``()`` is a scalar."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """A variable that an operation writes; ``type`` is ``None`` for a dictionary (class probabilities)."""

    name: str
    type: TensorType | None


@dataclass(frozen=True)
class Operation:
    """One step: for each parameter the names of the variables it is given, and the variables it writes."""

    type: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Program:
    """The main function of a package. ``constants`` are by variable name, in the types of the file."""

    path: Path
    inputs: Mapping[str, TensorType]
    constants: Mapping[str, np.ndarray]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    @property
    def precision(self) -> str:
        """``"fp16"`` if any variable that is computed is float16, else ``"fp32"``."""
        types = [output.type for operation in self.operations for output in operation.outputs]
        return "fp16" if any(t is not None and t.dtype == np.float16 for t in types) else "fp32"


def read_program(package: Path) -> Program:
    """The program in the folder ``package`` (a ``.mlpackage``).

    Raises :class:`InputError` if the folder is not a Core ML package with one ML Program, is damaged, or
    holds what this reader does not know (it says what).
    """
    spec = _read_specification(package)
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError(f"{package} holds a {spec.WhichOneof('Type') or 'nothing'}, not an ML Program.")
    functions = spec.mlProgram.functions
    if list(functions) != ["main"]:
        raise InputError(f"{package} has the functions {sorted(functions)}; only a single 'main' is known.")
    function = functions["main"]
    if function.opset not in function.block_specializations:
        raise InputError(f"{package} is damaged: it has no program for its operator set {function.opset!r}.")
    return _Reader(package).program(function, function.block_specializations[function.opset])


def _read_specification(package: Path) -> Any:
    messages = import_coremltools("coremltools.proto.Model_pb2")
    protobuf = import_coremltools("google.protobuf.message")
    path = package / MODEL_PATH
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{package} is not a Core ML package: {MODEL_PATH} is missing.") from error
    try:
        return messages.Model.FromString(data)
    except protobuf.DecodeError as error:
        raise InputError(f"{path} is damaged: it is not a Core ML model; export the model again.") from error


class _Reader:
    """One pass over the messages of one function."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._names = import_coremltools("coremltools.proto.MIL_pb2").DataType.Name
        self._weights: WeightFile | None = None
        self._constants: dict[str, np.ndarray] = {}

    def program(self, function: Any, block: Any) -> Program:
        inputs = {value.name: self._tensor_type(value.type, value.name) for value in function.inputs}
        operations = []
        for message in block.operations:
            if message.type == "const":
                value = message.attributes["val"]
                self._constants[message.outputs[0].name] = self._value(value, message.outputs[0].name)
            else:
                operations.append(self._operation(message))
        self._check_names(inputs, operations, tuple(block.outputs))
        return Program(self._package, inputs, self._constants, tuple(operations), tuple(block.outputs))

    def _operation(self, message: Any) -> Operation:
        label = message.outputs[0].name if message.outputs else message.type
        if message.blocks:
            raise InputError(f"The program in {self._package} uses control flow ({message.type}), unknown here.")
        inputs = {}
        for parameter, argument in message.inputs.items():
            names = []
            for index, binding in enumerate(argument.arguments):
                name = binding.name
                if binding.WhichOneof("binding") == "value":
                    # Not a name that the program could use: those hold no spaces.
                    name = f"{label} {parameter} {index}"
                    self._constants[name] = self._value(binding.value, name)
                names.append(name)
            inputs[parameter] = tuple(names)
        outputs = tuple(
            Output(
                value.name,
                self._tensor_type(value.type, value.name) if value.type.WhichOneof("type") == "tensorType" else None,
            )
            for value in message.outputs
        )
        return Operation(message.type, inputs, outputs)

    def _tensor_type(self, value_type: Any, name: str) -> TensorType:
        tensor = value_type.tensorType
        kind = self._names(tensor.dataType)
        if value_type.WhichOneof("type") != "tensorType" or kind not in _DTYPES:
            raise InputError(f"The variable {name!r} in {self._package} is of the unknown type {kind}.")
        if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions):
            raise InputError(f"The variable {name!r} in {self._package} has no fixed shape; none is known here.")
        return TensorType(_DTYPES[kind], tuple(int(size.constant.size) for size in tensor.dimensions))

    def _value(self, value: Any, name: str) -> np.ndarray:
        if value.WhichOneof("value") == "blobFileValue":
            declared = self._tensor_type(value.type, name)
            if value.blobFileValue.fileName != _WEIGHTS_NAME:
                raise InputError(f"The constant {name!r} in {self._package} lies in an unknown file.")
            if self._weights is None:
                self._weights = read_weight_file(self._package / WEIGHTS_PATH)
            return self._weights.read(value.blobFileValue.offset, declared.dtype, declared.shape)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            return np.array([self._value(item, name) for item in immediate.list.values])
        if immediate.WhichOneof("value") != "tensor":
            raise InputError(f"The constant {name!r} in {self._package} is neither a tensor nor a list.")
        declared = self._tensor_type(value.type, name)
        tensor = immediate.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            values = np.zeros(0, declared.dtype)
        elif field == "bytes":
            # Types narrower than protobuf's numbers (float16, int8, …) are given by their bytes.
            content = tensor.bytes.values
            if len(content) % declared.dtype.itemsize:
                raise InputError(f"The constant {name!r} in {self._package} is damaged: bytes are missing.")
            values = np.frombuffer(content, declared.dtype)
        else:
            values = np.array(getattr(tensor, field).values, declared.dtype)
        if values.size != math.prod(declared.shape):
            raise InputError(
                f"The constant {name!r} in {self._package} is damaged: it has {values.size} values for the "
                f"shape {declared.shape}."
            )
        return values.reshape(declared.shape)

    def _check_names(
        self, inputs: Mapping[str, TensorType], operations: list[Operation], outputs: tuple[str, ...]
    ) -> None:
        known = {*inputs, *self._constants}
        for operation in operations:
            for name in (name for names in operation.inputs.values() for name in names):
                if name not in known:
                    raise InputError(f"The program in {self._package} is damaged: {name!r} is used before it is made.")
            known.update(output.name for output in operation.outputs)
        missing = [name for name in outputs if name not in known]
        if missing:
            raise InputError(f"The program in {self._package} is damaged: nothing makes {missing[0]!r}.")
