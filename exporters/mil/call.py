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
    """One operation with its parameters' values."""

    operation: Operation
    values: dict[str, tuple[Value, ...]]

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

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        """A constant parameter as axes of an array with the images in front; ``rank`` counts without them."""
        return tuple(axis % rank + 1 for axis in self.integers(name))

    def unknown(self, what: str) -> InputError:
        """The error for a use of the operator that the evaluator does not know; ``what`` goes on its name."""
        label = self.operation.outputs[0].name if self.operation.outputs else "?"
        return InputError(f"The operator {self.operation.type!r} (it makes {label!r}) {what}, unknown here.")
