"""The types of the elements of tensors: names in a program, numbers in ``weight.bin``, packing below one byte.

Elements narrower than a byte lie side by side, the first in the lowest bits; one that does not fit into what is
left of a byte continues in the lowest bits of the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ElementType:
    """One type: its name in a program, the NumPy type that its values are kept in, its width in bits.

    ``stored`` is its number in ``weight.bin``, ``None`` where that file holds no such values.
    """

    name: str
    dtype: np.dtype
    bits: int
    stored: int | None

    def size(self, count: int) -> int:
        """Bytes that ``count`` values take."""
        return (count * self.bits + 7) // 8

    def values(self, data: bytes | memoryview, count: int) -> np.ndarray:
        """``count`` values from the start of ``data``, which holds at least :meth:`size` bytes; flat."""
        if self.bits >= 8:
            return np.frombuffer(data, self.dtype, count)
        values = unpacked(np.frombuffer(data, np.uint8, self.size(count)), self.bits, count)
        if self.dtype.kind == "i":
            # Two's complement: the highest bit counts negative.
            values = (values ^ (1 << self.bits - 1)).view(np.int8) - np.int8(1 << self.bits - 1)
        return values


@dataclass(frozen=True)
class TensorType:
    """Type and shape of a tensor as the program declares them; ``()`` is a scalar."""

    element: ElementType
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """NumPy's type of the values."""
        return self.element.dtype


def unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``count`` numbers of ``bits`` (1, 2, 3, 4, 6 or 8) from packed bytes, as uint8.

    Raises ``ValueError`` if ``data`` (uint8) holds fewer.
    """
    if len(data) * 8 < count * bits:
        raise ValueError(f"{len(data)} bytes hold fewer than {count} numbers of {bits} bits")
    if bits == 8:
        return data[:count]
    # The smallest number of bytes that holds whole elements.
    width = math.lcm(bits, 8) // 8
    rows = -(-count * bits // (8 * width))
    groups = np.zeros((rows, width), np.uint8)
    used = data[: rows * width]
    groups.reshape(-1)[: len(used)] = used
    words = groups[:, 0].astype(np.uint32)
    for place in range(1, width):
        words |= groups[:, place].astype(np.uint32) << np.uint32(8 * place)
    per_word = 8 * width // bits
    values = np.empty((rows, per_word), np.uint8)
    for place in range(per_word):
        values[:, place] = words >> np.uint32(place * bits) & np.uint32((1 << bits) - 1)
    return values.reshape(-1)[:count]


def _element(name: str, dtype: str, stored: int | None = None, bits: int | None = None) -> ElementType:
    kind = np.dtype(dtype)
    return ElementType(name, kind, bits or 8 * kind.itemsize, stored)


# By name. Strings are NumPy strings of any length; they are never stored as bytes.
ELEMENTS: dict[str, ElementType] = {
    element.name: element
    for element in (
        _element("FLOAT16", "<f2", 1),
        _element("FLOAT32", "<f4", 2),
        _element("FLOAT64", "<f8"),
        _element("INT4", "i1", 8, bits=4),
        _element("INT8", "i1", 4),
        _element("INT16", "<i2", 6),
        _element("INT32", "<i4", 14),
        _element("INT64", "<i8"),
        _element("UINT1", "u1", 9, bits=1),
        _element("UINT2", "u1", 10, bits=2),
        _element("UINT3", "u1", 12, bits=3),
        _element("UINT4", "u1", 11, bits=4),
        _element("UINT6", "u1", 13, bits=6),
        _element("UINT8", "u1", 3),
        _element("UINT16", "<u2", 7),
        _element("UINT32", "<u4", 15),
        _element("BOOL", "?"),
        _element("STRING", "U", bits=8),
    )
}
