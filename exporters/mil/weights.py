"""The weights of an ML Program: ``weight.bin``, a header and 64-byte-aligned entries.

Layout (little-endian; the format of MIL blob storage version 2):

* bytes 0–63: number of entries (uint32), version (uint32, 2), the rest zero;
* an entry's metadata, 64 bytes at a multiple of 64: sentinel 0xDEADBEEF (uint32), type (uint32), size in bytes
  (uint64), offset of the values from the start of the file (uint64), the rest zero;
* the values, at a multiple of 64, row-major.

A program names an entry by the offset of its metadata. Every length is checked against the file before it is
used, so a truncated or altered file is an error and never a read outside of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keys.errors import InputError

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<IIQQ")
# Types of the entries that ViT exports hold, by their number in the file.
_TYPES: dict[int, np.dtype] = {
    1: np.dtype("<f2"),
    2: np.dtype("<f4"),
    3: np.dtype("u1"),
    4: np.dtype("i1"),
    6: np.dtype("<i2"),
    7: np.dtype("<u2"),
    14: np.dtype("<i4"),
    15: np.dtype("<u4"),
}


@dataclass(frozen=True)
class WeightFile:
    """The bytes of a ``weight.bin`` and where they came from; see :func:`read_weight_file`."""

    path: Path
    data: bytes

    def read(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The entry whose metadata lies at ``offset``, read-only, of ``dtype`` and ``shape``.

        Raises :class:`InputError` if there is no such entry or its type or size is another.
        """
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= len(self.data) - ALIGNMENT:
            raise self._damaged(f"no entry can start at byte {offset} of {len(self.data)}")
        sentinel, number, size, start = _ENTRY.unpack_from(self.data, offset)
        if sentinel != SENTINEL:
            raise self._damaged(f"there is no entry at byte {offset}")
        if number not in _TYPES:
            raise self._damaged(f"the entry at byte {offset} is of the unknown type {number}")
        if _TYPES[number] != dtype:
            raise self._damaged(f"the entry at byte {offset} is {_TYPES[number]}, the program wants {dtype}")
        wanted = math.prod(shape) * dtype.itemsize
        if size != wanted:
            raise self._damaged(f"the entry at byte {offset} has {size} bytes, the program wants {wanted}")
        if start % ALIGNMENT or start < offset + ALIGNMENT or start + size > len(self.data):
            raise self._damaged(f"the values of the entry at byte {offset} lie outside of the file")
        return np.frombuffer(self.data, dtype, math.prod(shape), start).reshape(shape)

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"The weights {self.path} are damaged: {reason}; export the model again.")


def read_weight_file(path: Path) -> WeightFile:
    """Read and check the header of a ``weight.bin``. Raises :class:`InputError` if it is not one."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"There are no weights at {path}; the Core ML package is incomplete.") from error
    if len(data) < ALIGNMENT:
        raise InputError(f"The weights {path} are damaged: {len(data)} bytes are less than a header.")
    _, version = _HEADER.unpack_from(data)
    if version != VERSION:
        raise InputError(f"The weights {path} are of version {version}; only version {VERSION} is known.")
    return WeightFile(path, data)
