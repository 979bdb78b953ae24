"""An ML Program evaluated in NumPy, many images at a time.

How a batch goes through a program written for one image: every array carries one more axis in front, the
images, and every operator leaves that axis alone (it sees axis a of the program at a + 1). What does not
depend on an image has length 1 there and is broadcast. So no shape in the program has to be rewritten.

Numerical model: values are rounded to the type that the program declares at every operator's output, float16
ones once, to nearest even; between two roundings an operator computes in float32 (sums, softmax, layer norm and
the products of matrices too). Apple's hardware may accumulate in other orders and, on the Neural Engine, in
float16: this evaluator shows what the package says, not the last bits of one chip, and the limits in
:mod:`exporters.parity` are stated for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from exporters.mil.call import Call, Value
from exporters.mil.ops import OPERATORS
from exporters.mil.program import Operation, Program, TensorType
from keys.errors import InputError

# Largest number of values of one variable over a batch: 16 MB as float32, so that a batch stays in the caches.
_BUDGET = 4_000_000
_LARGEST_BATCH = 256


class Evaluator:
    """``program`` ready to run. Raises :class:`InputError` naming the first operator that is unknown."""

    def __init__(self, program: Program) -> None:
        for operation in program.operations:
            if operation.type not in OPERATORS:
                raise InputError(
                    f"The operator {operation.type!r} in {program.path} is not known to the evaluator; "
                    "parity of this model cannot be measured here."
                )
        self.program = program
        self._constants = {name: Value(_stored(value), False) for name, value in program.constants.items()}
        self._dead = _last_uses(program)
        sizes = [math.prod(o.type.shape) for op in program.operations for o in op.outputs if o.type is not None]
        self._batch = max(1, min(_LARGEST_BATCH, _BUDGET // max([*sizes, 1])))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The program's outputs for N examples.

        ``inputs`` are by name N×(declared shape), the same N ≥ 1 for all; so are the outputs. A dictionary of
        class probabilities is given as N×1×K. Raises :class:`InputError` for other inputs, or if an operator
        gives another shape than the program declares.
        """
        declared = {name: tensor.shape for name, tensor in self.program.inputs.items()}
        found = {name: value.shape[1:] for name, value in inputs.items()}
        counts = {len(value) for value in inputs.values()}
        if found != declared or len(counts) != 1 or 0 in counts:
            raise InputError(f"{self.program.path} takes {declared} for each example; it was given {found}.")
        total = counts.pop()
        parts = [
            self._run_batch({name: value[start : start + self._batch] for name, value in inputs.items()})
            for start in range(0, total, self._batch)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.program.outputs}

    def _run_batch(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(inputs.values())))
        values = dict(self._constants)
        for name, tensor in self.program.inputs.items():
            values[name] = Value(_rounded(inputs[name], tensor), True)
        # Overflow and invalid values show in the result, where parity finds them.
        with np.errstate(all="ignore"):
            for index, operation in enumerate(self.program.operations):
                self._step(operation, values)
                for name in self._dead[index]:
                    del values[name]
        outputs = {name: values[name].data for name in self.program.outputs}
        return {name: np.broadcast_to(data, (count, *data.shape[1:])) for name, data in outputs.items()}

    def _step(self, operation: Operation, values: dict[str, Value]) -> None:
        given = {parameter: tuple(values[name] for name in names) for parameter, names in operation.inputs.items()}
        call = Call(operation, given)
        result = OPERATORS[operation.type](call)
        results = result if isinstance(result, tuple) else (result,)
        for output, data in zip(operation.outputs, results, strict=True):
            if output.type is not None:
                if data.shape[1:] != output.type.shape:
                    raise InputError(
                        f"The operator {operation.type!r} in {self.program.path} gave {output.name!r} the shape "
                        f"{data.shape[1:]}; the program declares {output.type.shape}."
                    )
                data = _rounded(data, output.type)
            values[output.name] = Value(data, call.per_image)


def _stored(value: np.ndarray) -> np.ndarray:
    """A constant with the axis of the images in front; float16 as float32, which every operator computes in."""
    return (value.astype(np.float32) if value.dtype == np.float16 else value)[np.newaxis]


def _rounded(data: np.ndarray, declared: TensorType) -> np.ndarray:
    if declared.dtype == np.float16:
        return data.astype(np.float16).astype(np.float32)
    if declared.dtype.kind == "U":
        return data
    return data.astype(declared.dtype, copy=False)


def _last_uses(program: Program) -> list[list[str]]:
    """For each operation the computed variables that nothing needs after it, so that memory stays small."""
    kept = {*program.constants, *program.outputs}
    dead: list[list[str]] = [[] for _ in program.operations]
    for index in reversed(range(len(program.operations))):
        operation = program.operations[index]
        names = [name for group in operation.inputs.values() for name in group]
        names += [output.name for output in operation.outputs]
        for name in dict.fromkeys(names):
            if name not in kept:
                kept.add(name)
                dead[index].append(name)
    return dead
