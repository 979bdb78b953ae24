"""What an operator of the evaluator is given: its operation and the values of its parameters, read by kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporters.mil.program import Operation
from keys.errors import InputError


@dataclass(frozen=True)
class Value:
    """An array with the axis of the images in front, and whether it depends on the image at all.

    The front axis has length 1 where the value is the same for all images.
    """

    data: np.ndarray
    per_image: bool


@dataclass(frozen=True)
class Call:
    """One operation with its parameters' values, in a program for iOS ``target``."""

    operation: Operation
    values: dict[str, tuple[Value, ...]]
    target: int

    @property
    def per_image(self) -> bool:
        """Whether any parameter depends on the image."""
        return any(value.per_image for group in self.values.values() for value in group)

    def has(self, name: str) -> bool:
        """Whether the parameter ``name`` was given."""
        return bool(self.values.get(name))

    def tensor(self, name: str) -> np.ndarray:
        """The parameter ``name``, the images in front."""
        if not self.has(name):
            raise self.unknown(f"has no parameter {name!r}")
        return self.values[name][0].data

    def tensors(self, name: str) -> list[np.ndarray]:
        """The values of a parameter that takes several, the images in front of each."""
        return [value.data for value in self.values.get(name, ())]

    def constant(self, name: str) -> np.ndarray:
        """The parameter ``name``, which must not depend on the image, as the program has it."""
        if self.has(name) and self.values[name][0].per_image:
            raise self.unknown(f"takes {name!r} from the image")
        return self.tensor(name)[0]

    def integers(self, name: str) -> tuple[int, ...]:
        """A constant parameter as integers."""
        return tuple(int(value) for value in self.constant(name).reshape(-1))

    def integer(self, name: str, default: int | None = None) -> int:
        """A constant parameter as one integer, ``default`` if it was not given and there is one."""
        if default is not None and not self.has(name):
            return default
        return int(self.constant(name).item())

    def number(self, name: str, default: float) -> np.float32:
        """A constant parameter as one float32, ``default`` if it was not given."""
        return np.float32(self.constant(name).item() if self.has(name) else default)

    def text(self, name: str, default: str) -> str:
        """A constant parameter as a string, ``default`` if it was not given."""
        return str(self.constant(name).item()) if self.has(name) else default

    def flag(self, name: str) -> bool:
        """A constant parameter as a truth value; false if it was not given."""
        return bool(self.constant(name).item()) if self.has(name) else False

    def flags(self, name: str, count: int) -> tuple[bool, ...]:
        """A constant parameter as ``count`` truth values; all false if it was not given."""
        return tuple(map(bool, self.constant(name))) if self.has(name) else (False,) * count

    def axis(self, name: str, rank: int, default: int | None = None) -> int:
        """A constant parameter as one axis of an array with the images in front; ``rank`` counts without them.

        ``default`` is the program's axis if the parameter was not given.
        """
        axis = self.integer(name, default)
        if not -rank <= axis < rank:
            raise self.unknown(f"has {name!r} {axis} for {rank} axes")
        return axis % rank + 1

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        """As :meth:`axis`, for several."""
        axes = self.integers(name)
        if any(not -rank <= axis < rank for axis in axes):
            raise self.unknown(f"has {name!r} {axes} for {rank} axes")
        return tuple(axis % rank + 1 for axis in axes)

    def expect(self, shape: tuple[int, ...], output: int = 0) -> None:
        """Refuse the operation if it would make ``shape`` (without the images) and the program declares another.

        Called before memory is asked for by the operators that make more values than they are given.
        """
        declared = self.operation.outputs[output].type
        if declared is not None and tuple(shape) != declared.shape:
            raise InputError(
                f"The operator {self.operation.type!r} gives {self.operation.outputs[output].name!r} the shape "
                f"{tuple(shape)}; the program declares {declared.shape}."
            )

    def unknown(self, what: str) -> InputError:
        """The error for a use of the operator that the evaluator does not know; ``what`` goes on its name."""
        return InputError(
            f"The operator {self.operation.type!r} (it makes {self.operation.label!r}) {what}, unknown here."
        )
