"""Where the weights lie in the bytes of an ONNX file, without the onnx library: devices read it, too.

An ONNX file is one protobuf message. Only the path to the weights is followed (ModelProto.graph = 7,
GraphProto.initializer = 5, and of a TensorProto dims = 1, data_type = 2, name = 8, raw_data = 9,
external_data = 13, data_location = 14); everything else is passed over unread. Every length is checked against
its surroundings, so a truncated or altered file is an error and never a read outside of it.

>>> encoded_varint(300).hex()
'ac02'
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from keys.errors import InputError

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 9, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
# TensorProto.DataType → NumPy's type, for all that exports hold.
_TYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1"), 4: np.dtype("<u2"), 5: np.dtype("<i2"),
    6: np.dtype("<i4"), 7: np.dtype("<i8"), 9: np.dtype("?"), 10: np.dtype("<f2"), 11: np.dtype("<f8"),
}  # fmt: skip
# Files name what lies outside of them; the weights of a file that was split lie in the caller's memory.
IN_MEMORY = b"in-memory"


@dataclass(frozen=True)
class StoredTensor:
    """An initializer: ``length`` bytes of ``dtype`` values in ``shape``, row-major, at ``offset`` of the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """The values, a read-only view of ``data``."""
        return np.frombuffer(data, self.dtype, math.prod(self.shape), self.offset).reshape(self.shape)


@dataclass(frozen=True)
class _Field:
    """One field of a message: its number, its wire type, where it starts, and where its value starts and ends."""

    number: int
    kind: int
    start: int
    begin: int
    end: int
    value: int = 0


def stored_tensors(data: bytes) -> list[StoredTensor]:
    """Every initializer of the graph that is stored as raw bytes, in the order of the file.

    Raises :class:`InputError` if the bytes are not an ONNX file, are damaged, or if an initializer is stored in
    another way.
    """
    view = memoryview(data)
    tensors = []
    for graph in _fields(view, 0, len(view), _GRAPH):
        tensors += [_tensor(view, field) for field in _fields(view, graph.begin, graph.end, _INITIALIZER)]
    if not tensors:
        raise _damaged("it holds no weights")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _damaged("two of its weights have one name")
    return tensors


def split(data: bytes) -> tuple[bytes, dict[str, np.ndarray]]:
    """An ONNX file as the graph without weights, and the weights by name as views of ``data``.

    The graph says of each that it lies outside, in a file that does not exist: a session gets them from memory
    (``SessionOptions.add_external_initializers``). Tensors of under 128 bytes stay in the graph: shape inference
    reads them. Raises :class:`InputError` as :func:`stored_tensors` does.
    """
    outside = {tensor.name: tensor for tensor in stored_tensors(data) if tensor.length >= _SMALLEST_OUTSIDE}
    view = memoryview(data)
    model = bytearray()
    for field in _fields(view, 0, len(view)):
        if field.number != _GRAPH:
            model += view[field.start : field.end]
            continue
        graph = bytearray()
        for part in _fields(view, field.begin, field.end):
            tensor = _tensor(view, part) if part.number == _INITIALIZER else None
            if tensor is None or tensor.name not in outside:
                graph += view[part.start : part.end]
            else:
                graph += _delimited(_INITIALIZER, _reference(view, part, tensor))
        model += _delimited(_GRAPH, graph)
    return bytes(model), {name: tensor.read(data) for name, tensor in outside.items()}


_SMALLEST_OUTSIDE = 128


def encoded_varint(value: int) -> bytes:
    """A non-negative integer as protobuf writes it: seven bits per byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _tensor(view: memoryview, message: _Field) -> StoredTensor:
    shape: list[int] = []
    kind, name, raw = 0, "", None
    for field in _fields(view, message.begin, message.end):
        if field.number == _DIMS:
            shape += [field.value] if field.kind == _VARINT else _packed(view, field)
        elif field.number == _DATA_TYPE:
            kind = field.value
        elif field.number == _NAME:
            name = bytes(view[field.begin : field.end]).decode("utf-8", "replace")
        elif field.number == _RAW_DATA:
            raw = field
        elif field.number in (_EXTERNAL_DATA, _DATA_LOCATION):
            raise _damaged(f"the weights {name!r} lie in another file")
    if kind not in _TYPES:
        raise _damaged(f"the weights {name!r} are of the unknown type {kind}")
    if raw is None or raw.kind != _BYTES:
        raise _damaged(f"the weights {name!r} are not stored as bytes")
    dtype = _TYPES[kind]
    if math.prod(shape) * dtype.itemsize != raw.end - raw.begin:
        raise _damaged(f"the weights {name!r} have {raw.end - raw.begin} bytes for the shape {tuple(shape)}")
    return StoredTensor(name, dtype, tuple(shape), raw.begin, raw.end - raw.begin)


def _reference(view: memoryview, message: _Field, tensor: StoredTensor) -> bytes:
    """The tensor's message with its values replaced by a place outside of the file."""
    fields = _fields(view, message.begin, message.end)
    kept = b"".join(bytes(view[f.start : f.end]) for f in fields if f.number != _RAW_DATA)
    entries = {b"location": IN_MEMORY, b"offset": b"0", b"length": str(tensor.length).encode()}
    outside = [_delimited(_EXTERNAL_DATA, _delimited(1, k) + _delimited(2, v)) for k, v in entries.items()]
    location = encoded_varint(_DATA_LOCATION << 3 | _VARINT) + encoded_varint(_EXTERNAL)
    return kept + b"".join(outside) + location


def _delimited(number: int, content: bytes | bytearray) -> bytes:
    return encoded_varint(number << 3 | _BYTES) + encoded_varint(len(content)) + content


def _packed(view: memoryview, field: _Field) -> list[int]:
    values, position = [], field.begin
    while position < field.end:
        value, position = _varint(view, position, field.end)
        values.append(value)
    return values


def _fields(view: memoryview, begin: int, end: int, number: int | None = None) -> Iterator[_Field]:
    """The fields of the message between two places, all or those of one number."""
    position = begin
    while position < end:
        start = position
        tag, position = _varint(view, position, end)
        kind, value = tag & 7, 0
        if kind == _VARINT:
            first = position
            value, position = _varint(view, position, end)
        elif kind == _BYTES:
            length, first = _varint(view, position, end)
            position = first + length
        elif kind in (_FIXED32, _FIXED64):
            first = position
            position += 4 if kind == _FIXED32 else 8
        else:
            raise _damaged(f"an unknown kind of field at byte {start}")
        if position > end:
            raise _damaged(f"the field at byte {start} is longer than what it lies in")
        if number is None or number == tag >> 3:
            yield _Field(tag >> 3, kind, start, first, position, value)


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= end or shift > 63:
            raise _damaged(f"a number at byte {position} has no end")
        byte = view[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position


def _damaged(reason: str) -> InputError:
    return InputError(f"The ONNX file is damaged or was not written here: {reason}; export the model again.")
