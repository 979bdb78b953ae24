"""The weights of an ML Program: ``weight.bin``, a header and 64-byte-aligned entries.

Layout (little-endian; the format of MIL blob storage version 2):

* bytes 0–63: number of entries (uint32), version (uint32, 2), the rest zero;
* an entry's metadata, 64 bytes at a multiple of 64: sentinel 0xDEADBEEF (uint32), type (uint32), size in bytes
  (uint64), offset of the values from the start of the file (uint64), unused bits of the last byte (uint64; only
  types narrower than a byte have any), the rest zero;
* the values, at a multiple of 64, row-major, packed as :mod:`exporters.mil.types` says.

A program names an entry by the offset of its metadata. Every length is checked against the file before it is
used, so a truncated or altered file is an error and never a read outside of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from exporters.mil.types import ELEMENTS, TensorType
from keys.errors import InputError

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<IIQQQ")
_STORED = {element.stored: element for element in ELEMENTS.values() if element.stored is not None}


def stored_entries(data: bytes) -> list[tuple[int, int, int]]:
    """Type, offset of the values and length in bytes of every entry of a ``weight.bin``, in the order of the file.

    Raises :class:`InputError` if the bytes are not such a file.
    """
    damaged = InputError("A file weight.bin is damaged or of an unknown layout; export the model again.")
    if len(data) < ALIGNMENT:
        raise damaged
    count, _ = _HEADER.unpack_from(data)
    entries, position = [], ALIGNMENT
    for _ in range(count):
        if position + ALIGNMENT > len(data):
            raise damaged
        sentinel, kind, length, start, _ = _ENTRY.unpack_from(data, position)
        if sentinel != SENTINEL or start != position + ALIGNMENT or start + length > len(data):
            raise damaged
        entries.append((kind, start, length))
        position = -(-(start + length) // ALIGNMENT) * ALIGNMENT
    return entries


@dataclass(frozen=True)
class WeightFile:
    """The bytes of a ``weight.bin`` and what to call it in errors.

    Raises :class:`InputError` if the bytes do not start with the header of one.
    """

    label: str
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) < ALIGNMENT:
            raise self._damaged(f"{len(self.data)} bytes are less than a header")
        _, version = _HEADER.unpack_from(self.data)
        if version != VERSION:
            raise InputError(f"The weights {self.label} are of version {version}; only version {VERSION} is known.")

    def read(self, offset: int, declared: TensorType) -> np.ndarray:
        """The entry whose metadata lies at ``offset``, read-only where it is not packed, as ``declared``.

        Raises :class:`InputError` if there is no such entry or its type or size is another.
        """
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= len(self.data) - ALIGNMENT:
            raise self._damaged(f"no entry can start at byte {offset} of {len(self.data)}")
        sentinel, number, size, start, unused = _ENTRY.unpack_from(self.data, offset)
        if sentinel != SENTINEL:
            raise self._damaged(f"there is no entry at byte {offset}")
        if number not in _STORED:
            raise self._damaged(f"the entry at byte {offset} is of the unknown type {number}")
        element, wanted = _STORED[number], declared.element
        if element != wanted:
            raise self._damaged(f"the entry at byte {offset} is {element.name}, the program wants {wanted.name}")
        count = math.prod(declared.shape)
        if size != wanted.size(count):
            raise self._damaged(f"the entry at byte {offset} has {size} bytes, the program wants {wanted.size(count)}")
        if unused != 8 * size - count * wanted.bits:
            raise self._damaged(f"the entry at byte {offset} does not end where the program's {count} values do")
        if start % ALIGNMENT or start < offset + ALIGNMENT or start + size > len(self.data):
            raise self._damaged(f"the values of the entry at byte {offset} lie outside of the file")
        return wanted.values(memoryview(self.data)[start : start + size], count).reshape(declared.shape)

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"The weights {self.label} are damaged: {reason}; export the model again.")
