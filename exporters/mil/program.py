"""An ML Program as frozen data: constants, operations in order, inputs and outputs.

Read with coremltools' protobuf messages (which load on every system) and :mod:`exporters.mil.weights`, from a
folder or from memory. All that the evaluator needs is parsed here once; what it could not compute (several
functions, unknown types, control flow, sets of operators that it was not written for) is refused here with a
sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.mil.files import PackageFiles, Source
from exporters.mil.types import ELEMENTS, ElementType, TensorType
from exporters.mil.weights import WeightFile
from exporters.quiet import import_coremltools
from keys.errors import InputError

ITEM = "com.apple.CoreML"
MODEL_PATH = f"Data/{ITEM}/model.mlmodel"
WEIGHTS_PATH = f"Data/{ITEM}/weights/weight.bin"
_WEIGHTS_NAME = "@model_path/weights/weight.bin"

# Version of iOS by the name of its set of operators; the same versions are macOS 13, 14 and 15.
OPSETS = {"CoreML6": 16, "CoreML7": 17, "CoreML8": 18}

# More values than any variable of a ViT has (24 heads of 3,300 tokens). Damage that says more is refused before
# memory is asked for.
LARGEST_TENSOR = 1 << 28

# Fields of an immediate value that may hold a type; others are damage. Bytes hold the types given last.
_FIELDS = {
    "floats": ("FLOAT32",),
    "doubles": ("FLOAT64",),
    "ints": ("INT32", "INT16", "UINT16", "INT8", "UINT8", "UINT32"),
    "longInts": ("INT64",),
    "bools": ("BOOL",),
    "strings": ("STRING",),
    "bytes": tuple(name for name, element in ELEMENTS.items() if element.stored is not None),
}


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

    @property
    def label(self) -> str:
        """The variable that it makes, to name it by."""
        return self.outputs[0].name if self.outputs else "nothing"


@dataclass(frozen=True)
class Program:
    """The main function of a package, whose name in sentences is ``label``.

    ``target`` is the version of iOS whose operators it is written in (16, 17 or 18). ``constants`` are by variable
    name, in the types of the file (below one byte: int8 or uint8).
    """

    label: str
    target: int
    inputs: Mapping[str, TensorType]
    constants: Mapping[str, np.ndarray]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    @property
    def precision(self) -> str:
        """``"fp16"`` if any variable that is computed is float16, else ``"fp32"``."""
        types = [output.type for operation in self.operations for output in operation.outputs]
        return "fp16" if any(t is not None and t.dtype == np.float16 for t in types) else "fp32"


def read_program(package: Source) -> Program:
    """The program in ``package``: a ``.mlpackage`` folder, or its files' bytes by their path inside it.

    Raises :class:`InputError` if it is not a Core ML package with one ML Program, is damaged, or holds what this
    reader does not know (it says what).
    """
    files = PackageFiles(package)
    spec = _read_specification(files)
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError(f"{files.label} holds a {spec.WhichOneof('Type') or 'nothing'}, not an ML Program.")
    functions = spec.mlProgram.functions
    if list(functions) != ["main"]:
        raise InputError(f"{files.label} has the functions {sorted(functions)}; only a single 'main' is known.")
    function = functions["main"]
    if function.opset not in function.block_specializations:
        raise InputError(f"{files.label} is damaged: it has no program for its operator set {function.opset!r}.")
    if function.opset not in OPSETS:
        raise InputError(
            f"{files.label} uses the operator set {function.opset!r}; only {', '.join(OPSETS)} (iOS 16 to 18) are "
            "known: export for one of them."
        )
    return _Reader(files).program(function, function.block_specializations[function.opset])


def _read_specification(files: PackageFiles) -> Any:
    messages = import_coremltools("coremltools.proto.Model_pb2")
    protobuf = import_coremltools("google.protobuf.message")
    data = files.read(MODEL_PATH, f"{files.label} is not a Core ML package: {MODEL_PATH} is missing.")
    try:
        return messages.Model.FromString(data)
    except protobuf.DecodeError as error:
        raise InputError(
            f"{files.name(MODEL_PATH)} is damaged: it is not a Core ML model; export the model again."
        ) from error


class _Reader:
    """One pass over the messages of one function."""

    def __init__(self, files: PackageFiles) -> None:
        self._files = files
        self._label = files.label
        numbers: Mapping[str, int] = dict(import_coremltools("coremltools.proto.MIL_pb2").DataType.items())
        self._elements = {numbers[name]: element for name, element in ELEMENTS.items()}
        self._weights: WeightFile | None = None
        self._constants: dict[str, np.ndarray] = {}

    def program(self, function: Any, block: Any) -> Program:
        inputs = {value.name: self._tensor_type(value.type, value.name) for value in function.inputs}
        operations: list[Operation] = []
        for message in block.operations:
            if message.type == "const" and len(message.outputs) == 1:
                value = message.attributes["val"]
                self._constants[message.outputs[0].name] = self._value(value, message.outputs[0].name)
            else:
                operations.append(self._operation(message))
        self._check_names(inputs, operations, tuple(block.outputs))
        target = OPSETS[function.opset]
        return Program(self._label, target, inputs, self._constants, tuple(operations), tuple(block.outputs))

    def _operation(self, message: Any) -> Operation:
        label = message.outputs[0].name if message.outputs else message.type
        if message.blocks:
            raise InputError(f"The program in {self._label} uses control flow ({message.type}), unknown here.")
        inputs: dict[str, tuple[str, ...]] = {}
        for parameter, argument in message.inputs.items():
            names: list[str] = []
            for index, binding in enumerate(argument.arguments):
                name = binding.name
                if binding.WhichOneof("binding") == "value":
                    name = self._immediate(f"{label} {parameter} {index}", binding.value)
                names.append(name)
            inputs[parameter] = tuple(names)
        # Up to iOS 17 the operators of compressed weights are given their parameters here and not as inputs.
        for parameter, value in message.attributes.items():
            if parameter != "name":
                inputs[parameter] = (self._immediate(f"{label} {parameter}", value),)
        outputs = tuple(
            Output(
                value.name,
                self._tensor_type(value.type, value.name) if value.type.WhichOneof("type") == "tensorType" else None,
            )
            for value in message.outputs
        )
        return Operation(message.type, inputs, outputs)

    def _immediate(self, name: str, value: Any) -> str:
        # Not a name that the program could use: those hold no spaces.
        self._constants[name] = self._value(value, name)
        return name

    def _tensor_type(self, value_type: Any, name: str) -> TensorType:
        tensor = value_type.tensorType
        element = self._elements.get(tensor.dataType)
        if value_type.WhichOneof("type") != "tensorType" or element is None:
            kind = value_type.WhichOneof("type") if element else f"number {tensor.dataType}"
            raise InputError(f"The variable {name!r} in {self._label} is of the unknown type {kind}.")
        if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions):
            raise InputError(f"The variable {name!r} in {self._label} has no fixed shape; none is known here.")
        shape = tuple(int(size.constant.size) for size in tensor.dimensions)
        if math.prod(shape) > LARGEST_TENSOR:
            raise InputError(
                f"The variable {name!r} in {self._label} has {math.prod(shape)} values; at most {LARGEST_TENSOR} "
                "are evaluated here."
            )
        return TensorType(element, shape)

    def _value(self, value: Any, name: str) -> np.ndarray:
        if value.WhichOneof("value") == "blobFileValue":
            return self._stored(value, name)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            items = [self._value(item, name) for item in immediate.list.values]
            if len({(item.shape, item.dtype.kind) for item in items}) > 1:
                raise self._damaged(name, "the parts of its list differ in shape")
            return np.array(items)
        if immediate.WhichOneof("value") != "tensor":
            raise self._damaged(name, "it is neither a tensor nor a list")
        declared = self._tensor_type(value.type, name)
        values = self._immediate_values(immediate.tensor, declared.element, math.prod(declared.shape), name)
        return values.reshape(declared.shape)

    def _stored(self, value: Any, name: str) -> np.ndarray:
        declared = self._tensor_type(value.type, name)
        if value.blobFileValue.fileName != _WEIGHTS_NAME:
            raise InputError(f"The constant {name!r} in {self._label} lies in an unknown file.")
        if self._weights is None:
            label = self._files.name(WEIGHTS_PATH)
            missing = f"There are no weights at {label}; the Core ML package is incomplete."
            self._weights = WeightFile(label, self._files.read(WEIGHTS_PATH, missing))
        return self._weights.read(value.blobFileValue.offset, declared)

    def _immediate_values(self, tensor: Any, element: ElementType, count: int, name: str) -> np.ndarray:
        field = tensor.WhichOneof("value")
        if field is None:
            values = np.zeros(0, element.dtype)
        elif element.name not in _FIELDS[field]:
            raise self._damaged(name, f"values of the type {element.name} cannot be given as {field}")
        elif field == "bytes":
            # Types narrower than protobuf's numbers (float16, int8, …) are given by their bytes.
            content = tensor.bytes.values
            if len(content) != element.size(count):
                raise self._damaged(name, f"{count} values take {element.size(count)} bytes, there are {len(content)}")
            values = element.values(content, count)
        else:
            try:
                values = np.array(getattr(tensor, field).values, element.dtype)
            except OverflowError as error:
                raise self._damaged(name, f"a value is no {element.name}") from error
        if values.size != count:
            raise self._damaged(name, f"it has {values.size} values where its shape has {count}")
        return values

    def _damaged(self, name: str, reason: str) -> InputError:
        return InputError(f"The constant {name!r} in {self._label} is damaged: {reason}; export the model again.")

    def _check_names(
        self, inputs: Mapping[str, TensorType], operations: list[Operation], outputs: tuple[str, ...]
    ) -> None:
        known = {*inputs, *self._constants}
        for operation in operations:
            for name in (name for names in operation.inputs.values() for name in names):
                if name not in known:
                    raise InputError(f"The program in {self._label} is damaged: {name!r} is used before it is made.")
            for output in operation.outputs:
                if output.name in known:
                    raise InputError(f"The program in {self._label} is damaged: {output.name!r} is made twice.")
                known.add(output.name)
        missing = [name for name in outputs if name not in known]
        if missing:
            raise InputError(f"The program in {self._label} is damaged: nothing makes {missing[0]!r}.")
