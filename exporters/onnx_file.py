"""Where the weights lie in the bytes of an ONNX file, without the onnx library: devices read it, too.

An ONNX file is one protobuf message. Only the path to the weights is followed (ModelProto.graph = 7,
GraphProto.initializer = 5, and of a TensorProto dims = 1, data_type = 2, name = 8, raw_data = 9,
external_data = 13, data_location = 14); everything else is passed over unread. Every length is checked against
its surroundings, so a truncated or altered file is an error and never a read outside of it, and nothing is
allocated by a number that the file only claims.

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
# As many as NumPy knows; a longer list is damage.
_MOST_DIMENSIONS = 64
_INT64, _UINT64 = 2**63, 2**64 - 1
# Smaller tensors stay in the graph: shape inference reads them.
_SMALLEST_OUTSIDE = 128
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
        """The values, a read-only view of ``data``; it need not be aligned."""
        if self.length == 0:
            return np.zeros(self.shape, self.dtype)
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
    """Every initializer of the graph, in the order of the file; all of them must be stored as raw bytes.

    Raises :class:`InputError` if the bytes are not an ONNX file, are damaged, hold no weights, or if an initializer
    is stored in another way.
    """
    tensors = [_stored(message) for message in _initializers(memoryview(data))]
    if not tensors:
        raise _damaged("it holds no weights")
    return tensors


def split(data: bytes) -> tuple[bytes, dict[str, np.ndarray]]:
    """An ONNX file as the graph without weights, and the weights by name as views of ``data``.

    The graph says of each that it lies outside, in a file that does not exist: a session gets them from memory
    (``SessionOptions.add_external_initializers``). What is under 128 bytes, of another type than NumPy's or stored
    in another way than as raw bytes stays in the graph; if that is all, the graph is ``data`` itself. Raises
    :class:`InputError` if the bytes are not an ONNX file, are damaged, or if weights lie in another file.
    """
    view = memoryview(data)
    outside = {
        message.name: _stored(message)
        for message in _initializers(view)
        if message.is_raw and message.raw.end - message.raw.begin >= _SMALLEST_OUTSIDE
    }
    if not outside:
        return data, {}
    model = bytearray()
    for field in _fields(view, 0, len(view)):
        if field.number != _GRAPH:
            model += view[field.start : field.end]
            continue
        graph = bytearray()
        for part in _fields(view, field.begin, field.end):
            message = _message(view, part) if part.number == _INITIALIZER else None
            if message is None or message.name not in outside:
                graph += view[part.start : part.end]
            else:
                graph += _delimited(_INITIALIZER, _reference(view, part, outside[message.name]))
        model += _delimited(_GRAPH, graph)
    return bytes(model), {name: tensor.read(data) for name, tensor in outside.items()}


def encoded_varint(value: int) -> bytes:
    """A non-negative integer as protobuf writes it: seven bits per byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


@dataclass(frozen=True)
class _Message:
    """An initializer as its message says it: ``kind`` is a TensorProto.DataType; ``raw`` is where the values lie."""

    name: str
    shape: tuple[int, ...]
    kind: int
    raw: _Field

    @property
    def is_raw(self) -> bool:
        """Whether the values are bytes of a type that NumPy knows."""
        return self.raw.number == _RAW_DATA and self.kind in _TYPES


_NO_RAW_DATA = _Field(0, _BYTES, 0, 0, 0)


def _initializers(view: memoryview) -> list[_Message]:
    """All initializers of all graph fields: protobuf joins a field that is given twice."""
    messages: list[_Message] = []
    graphs = 0
    for graph in _fields(view, 0, len(view), _GRAPH):
        graphs += 1
        _expect(graph, _BYTES)
        messages += [_message(view, field) for field in _fields(view, graph.begin, graph.end, _INITIALIZER)]
    if not graphs:
        raise _damaged("it holds no graph")
    if len({message.name for message in messages}) < len(messages):
        raise _damaged("two of its weights have one name")
    return messages


def _message(view: memoryview, message: _Field) -> _Message:
    _expect(message, _BYTES)
    shape: list[int] = []
    kind, name, raw, outside = 0, "", _NO_RAW_DATA, False
    for field in _fields(view, message.begin, message.end):
        if field.number == _DIMS:
            shape += [field.value] if field.kind == _VARINT else _packed(view, field)
            if len(shape) > _MOST_DIMENSIONS:
                raise _damaged(f"weights have more than {_MOST_DIMENSIONS} dimensions")
        elif field.number == _DATA_TYPE:
            kind = _expect(field, _VARINT).value
        elif field.number == _NAME:
            name = _text(view, _expect(field, _BYTES))
        elif field.number == _RAW_DATA:
            raw = _expect(field, _BYTES)
        elif field.number == _EXTERNAL_DATA:
            outside = True
        elif field.number == _DATA_LOCATION:
            outside = outside or _expect(field, _VARINT).value == _EXTERNAL
    if outside:
        raise InputError(
            f"The ONNX file has the weights {name!r} in another file; export it again as one file with all weights."
        )
    return _Message(name, tuple(shape), kind, raw)


def _stored(message: _Message) -> StoredTensor:
    name, shape, raw = message.name, message.shape, message.raw
    if message.kind not in _TYPES:
        raise _damaged(f"the weights {name!r} are of the unknown type {message.kind}")
    if not message.is_raw:
        raise _damaged(f"the weights {name!r} are not stored as bytes")
    dtype = _TYPES[message.kind]
    length = raw.end - raw.begin
    # An array without values may still claim sides that NumPy cannot count.
    if math.prod(max(side, 1) for side in shape) * dtype.itemsize >= _INT64:
        raise _damaged(f"the weights {name!r} have an impossible shape")
    if math.prod(shape) * dtype.itemsize != length:
        raise _damaged(f"the weights {name!r} have {length} bytes for the shape {shape}")
    return StoredTensor(name, dtype, shape, raw.begin, length)


def _reference(view: memoryview, message: _Field, tensor: StoredTensor) -> bytes:
    """The tensor's message with its values replaced by a place outside of the file."""
    fields = _fields(view, message.begin, message.end)
    kept = b"".join(bytes(view[f.start : f.end]) for f in fields if f.number not in (_RAW_DATA, _DATA_LOCATION))
    entries = {b"location": IN_MEMORY, b"offset": b"0", b"length": str(tensor.length).encode()}
    outside = [_delimited(_EXTERNAL_DATA, _delimited(1, k) + _delimited(2, v)) for k, v in entries.items()]
    location = encoded_varint(_DATA_LOCATION << 3 | _VARINT) + encoded_varint(_EXTERNAL)
    return kept + b"".join(outside) + location


def _expect(field: _Field, kind: int) -> _Field:
    if field.kind != kind:
        raise _damaged(f"the field at byte {field.start} is of another kind")
    return field


def _text(view: memoryview, field: _Field) -> str:
    try:
        return bytes(view[field.begin : field.end]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(f"the name at byte {field.begin} is not UTF-8") from error


def _delimited(number: int, content: bytes | bytearray) -> bytes:
    return encoded_varint(number << 3 | _BYTES) + encoded_varint(len(content)) + content


def _packed(view: memoryview, field: _Field) -> list[int]:
    values: list[int] = []
    position = _expect(field, _BYTES).begin
    while position < field.end and len(values) <= _MOST_DIMENSIONS:
        value, position = _varint(view, position, field.end)
        values.append(value)
    return values


def _fields(view: memoryview, begin: int, end: int, number: int | None = None) -> Iterator[_Field]:
    """The fields of the message between two places, all or those of one number."""
    position = begin
    while position < end:
        start = position
        tag, position = _varint(view, position, end)
        number_here, kind, value = tag >> 3, tag & 7, 0
        if number_here == 0:
            raise _damaged(f"a field without a number at byte {start}")
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
        if number is None or number == number_here:
            yield _Field(number_here, kind, start, first, position, value)


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
            return value & _UINT64, position


def _damaged(reason: str) -> InputError:
    return InputError(f"The ONNX file is damaged or was not written here: {reason}; export the model again.")
