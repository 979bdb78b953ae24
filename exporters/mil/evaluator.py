"""An ML Program evaluated in NumPy, many images at a time.

How a batch goes through a program written for one image: every array carries one more axis in front, the
images, and every operator leaves that axis alone (it sees axis a of the program at a + 1). What does not
depend on an image has length 1 there and is broadcast. So no shape in the program has to be rewritten. What
does not depend on the image at all, compressed weights above all, is computed once, when the evaluator is built.

Numerical model: values are rounded to the type that the program declares at every operator's output, float16
ones once, to nearest even; between two roundings an operator computes in float32 (sums, softmax, layer norm and
the products of matrices too). Apple's hardware may accumulate in other orders and, on the Neural Engine, in
float16: this evaluator shows what the package says, not the last bits of one chip, and the limits in
:mod:`exporters.parity` are stated for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from exporters.mil.call import Call, Value
from exporters.mil.fast import round_to_half
from exporters.mil.ops import OPERATORS
from exporters.mil.program import Operation, Output, Program, TensorType
from keys.errors import InputError

# Largest number of values of one variable over a batch: as float32 it stays in the processor's caches.
_BUDGET = 1_000_000
_LARGEST_BATCH = 256

# What NumPy and Python raise for values, shapes and axes that do not fit each other, and for too much memory.
_UNFIT = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)

# Told of every variable when it is made: its operation, the values it was made of, itself, and the result
# before it was rounded to the declared type.
_Watch = Callable[[Operation, Output, Call, np.ndarray, np.ndarray], None]


class Evaluator:
    """``program`` ready to run.

    Raises :class:`InputError` naming the first operator, parameter or use of an operator that is unknown, or whose
    shapes are not as the program declares: the program is tried on one example of zeros, so that nothing is
    refused later.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        for operation in program.operations:
            self._check(operation)
        self._types = _declared(program)
        constants = {name: Value(_stored(value), False) for name, value in program.constants.items()}
        self._operations = self._folded(constants)
        needed = {name for operation in self._operations for group in operation.inputs.values() for name in group}
        self._constants = {
            name: value for name, value in constants.items() if name in needed or name in program.outputs
        }
        self._dead = _last_uses(self._operations, {*self._constants, *program.outputs})
        sizes = [math.prod(o.type.shape) for op in program.operations for o in op.outputs if o.type is not None]
        self._batch = max(1, min(_LARGEST_BATCH, _BUDGET // max([*sizes, 1])))
        self._run_batch({name: np.zeros((1, *t.shape), t.dtype) for name, t in program.inputs.items()})

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The program's outputs for N examples.

        ``inputs`` are by name N×(declared shape), the same N ≥ 1 for all; so are the outputs. A dictionary of
        class probabilities is given as N×1×K. Raises :class:`InputError` for other inputs.
        """
        parts = [self._run_batch(batch) for batch in self._batches(inputs)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.program.outputs}

    def first_overflow(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        """Where the numbers of a program stop being finite, in words, or ``None`` if all are finite.

        Names the first variable, in the order of the program, that is not finite for one of the examples although
        all that it was made of is, its operator, its type and the largest value before rounding. Slower than
        :meth:`run`, and made for when its outputs are not finite. Raises :class:`InputError` for other inputs.
        """
        # By place in the program; those made of finite values, and all.
        origins: dict[int, tuple[float, str]] = {}
        affected: dict[int, tuple[float, str]] = {}
        order = {id(operation): place for place, operation in enumerate(self.program.operations)}

        def watch(operation: Operation, output: Output, call: Call, exact: np.ndarray, data: np.ndarray) -> None:
            if data.dtype.kind != "f" or np.isfinite(data).all():
                return
            given = [value.data for group in call.values.values() for value in group]
            finite = all(np.isfinite(value).all() for value in given if value.dtype.kind == "f")
            largest = float(np.abs(exact.astype(np.float64)).max())
            place = order[id(operation)]
            for found in (affected, origins) if finite else (affected,):
                if place not in found or largest > found[place][0]:
                    found[place] = (largest, _overflow(operation, output, largest, finite))

        for batch in self._batches(inputs):
            values = {name: Value(_stored(value), False) for name, value in self.program.constants.items()}
            values.update(self._given(batch))
            with np.errstate(all="ignore"):
                for operation in self.program.operations:
                    self._step(operation, values, watch)
        # A mask may hold infinite values and be meant to; only where nothing else is found they are the cause.
        found = origins or affected
        return found[min(found)][1] if found else None

    def _check(self, operation: Operation) -> None:
        known = OPERATORS.get(operation.type)
        if known is None or known.since > self.program.target:
            reason = "" if known is None else f" before iOS {known.since}"
            raise InputError(
                f"The operator {operation.type!r} in {self.program.label} is not known to the evaluator{reason}; "
                "parity of this model cannot be measured here."
            )
        unknown = sorted(set(operation.inputs) - known.parameters)
        if unknown:
            raise InputError(
                f"The operator {operation.type!r} in {self.program.label} (it makes {operation.label!r}) has the "
                f"parameter {unknown[0]!r}, not known to the evaluator; parity cannot be measured here."
            )

    def _folded(self, values: dict[str, Value]) -> list[Operation]:
        """The operations that need the image; the results of the others are put into ``values``."""
        left: list[Operation] = []
        with np.errstate(all="ignore"):
            for operation in self.program.operations:
                if all(name in values for group in operation.inputs.values() for name in group):
                    self._step(operation, values)
                else:
                    left.append(operation)
        return left

    def _batches(self, inputs: Mapping[str, np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        declared = {name: tensor.shape for name, tensor in self.program.inputs.items()}
        found = {name: value.shape[1:] for name, value in inputs.items()}
        counts = {len(value) for value in inputs.values()}
        if found != declared or len(counts) != 1 or 0 in counts:
            raise InputError(f"{self.program.label} takes {declared} for each example; it was given {found}.")
        for start in range(0, counts.pop(), self._batch):
            yield {name: value[start : start + self._batch] for name, value in inputs.items()}

    def _given(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Value]:
        return {
            name: Value(_rounded(inputs[name], tensor, fresh=False), True)
            for name, tensor in self.program.inputs.items()
        }

    def _run_batch(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(inputs.values()), ()))
        values = {**self._constants, **self._given(inputs)}
        # Overflow and invalid values show in the result, where parity finds them.
        with np.errstate(all="ignore"):
            for index, operation in enumerate(self._operations):
                self._step(operation, values)
                for name in self._dead[index]:
                    del values[name]
        outputs = {name: values[name].data for name in self.program.outputs}
        return {name: np.broadcast_to(data, (count, *data.shape[1:])) for name, data in outputs.items()}

    def _step(self, operation: Operation, values: dict[str, Value], watch: _Watch | None = None) -> None:
        given = {parameter: tuple(values[name] for name in names) for parameter, names in operation.inputs.items()}
        call = Call(operation, given, self.program.target)
        try:
            result = OPERATORS[operation.type].function(call)
        except _UNFIT as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"The operator {operation.type!r} in {self.program.label} cannot make {operation.label!r} of what it "
                f"is given ({reason}); export the model again."
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(operation.outputs):
            raise call.unknown(f"has {len(operation.outputs)} results where {len(results)} are made")
        for place, (output, data) in enumerate(zip(operation.outputs, results, strict=True)):
            exact = data
            if output.type is not None:
                call.expect(data.shape[1:], place)
                if not self._moved(operation, output.type):
                    data = _rounded(data, output.type, fresh=watch is None and _is_fresh(data, call))
            if watch is not None:
                watch(operation, output, call, exact, data)
            values[output.name] = Value(data, call.per_image)

    def _moved(self, operation: Operation, declared: TensorType) -> bool:
        """Whether the result holds nothing but values that are already of the ``declared`` type."""
        names = (*operation.inputs.get("x", ()), *operation.inputs.get("values", ()))
        return (
            OPERATORS[operation.type].moves
            and declared.dtype.kind == "f"
            and bool(names)
            and all(self._types.get(name) == declared.dtype for name in names)
        )


def _overflow(operation: Operation, output: Output, largest: float, finite: bool) -> str:
    kind = output.type.element.name.lower() if output.type is not None else "dictionary"
    size = f"values up to {largest:.6g}" if math.isfinite(largest) else "values that are infinite or not numbers"
    source = "finite values" if finite else "values that are not all finite"
    return f"{output.name!r} ({kind}), which the operator {operation.type!r} makes of {source}: it gives {size}"


def _declared(program: Program) -> dict[str, np.dtype]:
    """NumPy's type of every variable, as the program declares it."""
    types = {name: tensor.dtype for name, tensor in program.inputs.items()}
    types.update({name: value.dtype for name, value in program.constants.items()})
    for operation in program.operations:
        types.update({output.name: output.type.dtype for output in operation.outputs if output.type is not None})
    return types


def _stored(value: np.ndarray) -> np.ndarray:
    """A constant with the axis of the images in front; float16 as float32, which every operator computes in."""
    return (value.astype(np.float32) if value.dtype == np.float16 else value)[np.newaxis]


def _is_fresh(data: np.ndarray, call: Call) -> bool:
    """Whether the operator made the memory of ``data`` itself, so that it holds no other variable."""
    owner = data if data.base is None else data.base
    given = (value.data for group in call.values.values() for value in group)
    return data.flags.writeable and not any(owner is other or owner is other.base for other in given)


def _rounded(data: np.ndarray, declared: TensorType, *, fresh: bool) -> np.ndarray:
    """``data`` in the ``declared`` type (float16 as float32); ``fresh`` says that it may be written to."""
    if declared.dtype == np.float16:
        if data.dtype != np.float32:
            return data.astype(np.float16).astype(np.float32)
        return round_to_half(data, in_place=fresh)
    if declared.dtype.kind == "U":
        return data
    return data.astype(declared.dtype, copy=False)


def _last_uses(operations: Sequence[Operation], kept: set[str]) -> list[list[str]]:
    """For each operation the computed variables that nothing needs after it, so that memory stays small."""
    dead: list[list[str]] = [[] for _ in operations]
    for index in reversed(range(len(operations))):
        operation = operations[index]
        names = [name for group in operation.inputs.values() for name in group]
        names += [output.name for output in operation.outputs]
        for name in dict.fromkeys(names):
            if name not in kept:
                kept.add(name)
                dead[index].append(name)
    return dead
