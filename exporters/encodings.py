"""How a tensor of a model becomes bytes in an exported file: a closed list of functions, named in templates.

Each must give, bit for bit, what the converter gives: templates are proven against a full conversion before they
are used (:mod:`exporters.template`), and the tests compare each function with the library that it stands for.

>>> weight = np.arange(4, dtype=np.float32).reshape(2, 2)
>>> bytes(encode("float32 transposed", Weight("w", weight))) == np.array([0, 2, 1, 3], np.float32).tobytes()
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from exporters.checks import check_float16
from exporters.onnx_file import encoded_varint
from keys.errors import InputError


class Weight:
    """A tensor to be written, float32 or int64, by its ``name``; what several encodings of it need is computed once."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values
        # torch rounds and divides as NumPy does, bit for bit, and several times faster. Nothing here writes into it.
        self.tensor = torch.from_numpy(values if values.flags.writeable else values.copy())

    @cached_property
    def largest_of_rows(self) -> np.ndarray:
        """The largest absolute value of each row, float32; of a vector, of each value."""
        flat = self.values.reshape(len(self.values), -1)
        # Of a row of zeros it must be 0.0, not -0.0, which is other bytes.
        return np.maximum(np.abs(flat.max(axis=1)), np.abs(flat.min(axis=1)))

    @cached_property
    def largest(self) -> float:
        """The largest absolute value; NaN if one of the values is, 0 if there are none."""
        if not self.values.size:
            return 0.0
        if self.values.ndim >= 2:
            return float(self.largest_of_rows.max())
        return max(float(self.values.max()), -float(self.values.min()))


@dataclass(frozen=True)
class Encoding:
    """One way to write a tensor. ``kind``: NumPy's of the tensors it takes, "f" or "i"; ``size``: bytes of one value.

    ``per_row``: whether it gives one value for each row. It takes tensors of ``ranks`` axes.
    """

    apply: Callable[[Weight], np.ndarray]
    kind: str
    size: int
    per_row: bool = False
    ranks: range = range(1, 9)

    def length(self, values: np.ndarray) -> int | None:
        """How many bytes it makes of a tensor of this type and shape, None if it does not take such tensors."""
        if values.dtype.kind != self.kind or values.ndim not in self.ranks or not values.size:
            return None
        return self.size * (len(values) if self.per_row else values.size)


def encode(name: str, weight: Weight) -> memoryview:
    """The bytes of ``weight`` in the encoding ``name`` of :data:`ENCODINGS`.

    Raises :class:`InputError` that names the tensor if it holds what cannot be written: NaN, infinity, or in float16
    a number beyond 65504.
    """
    if weight.values.dtype.kind == "f":
        if not np.isfinite(weight.largest):
            raise InputError(f"The tensor {weight.name} holds NaN or infinite values; train the model again.")
        if "float16" in name or "coremltools" in name:
            check_float16(weight.name, weight.largest)
    return np.ascontiguousarray(ENCODINGS[name].apply(weight)).reshape(-1).view(np.uint8).data


def _cast(dtype: str) -> Callable[[Weight], np.ndarray]:
    return lambda weight: weight.values.astype(dtype, copy=False)


def _transposed(apply: Callable[[Weight], np.ndarray]) -> Callable[[Weight], np.ndarray]:
    return lambda weight: apply(weight).T


def _float16(weight: Weight) -> np.ndarray:
    return weight.tensor.to(torch.float16).numpy()


def _onnx_scales(weight: Weight) -> np.ndarray:
    """onnxruntime's scale of each row: its largest absolute value over 127, computed in float64."""
    scales = weight.largest_of_rows.astype(np.float64) * 2 / 254
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def _onnx_int8(weight: Weight) -> np.ndarray:
    """onnxruntime's int8 values: value / scale of the row, to the nearest, ties to even."""
    quantised = weight.tensor / torch.from_numpy(_onnx_scales(weight)[:, np.newaxis])
    return quantised.round_().clamp_(-128, 127).to(torch.int8).numpy()


def _coreml_float16(weight: Weight) -> np.ndarray:
    """coremltools' float16: as NumPy's, but in tensors of fewer than 400 values none that is not zero becomes zero."""
    rounded, values = _float16(weight), weight.values
    if values.size >= 400:
        return rounded
    smallest = np.finfo(np.float16).smallest_subnormal
    lost = (np.abs(values) > np.finfo(np.float32).smallest_subnormal) & (rounded == 0)
    return np.where(lost, np.where(values > 0, smallest, -smallest), rounded)


def _coreml_scales(weight: Weight) -> np.ndarray:
    """coremltools' scale of each row of a float16 weight: twice its largest absolute value over 254, in float16."""
    # Rounding keeps order, so the largest of the rounded is the rounded largest.
    largest = weight.largest_of_rows.astype(np.float16)
    return (largest + largest) / np.float16(254)


def _coreml_int8(weight: Weight) -> np.ndarray:
    """coremltools' int8 values: float16 weight / scale of the row, rounded to float16, then to the nearest integer."""
    scales = torch.from_numpy(_coreml_scales(weight).astype(np.float32)[:, np.newaxis])
    quotient = weight.tensor.reshape(len(weight.values), -1).to(torch.float16).to(torch.float32).div_(scales)
    rounded = quotient.to(torch.float16).to(torch.float32).round_().clamp_(-127, 127)
    return rounded.nan_to_num_(0.0).to(torch.int8).numpy()  # a row of zeros has the scale zero


def _message_integers(weight: Weight) -> np.ndarray:
    """Integers as protobuf packs them; the length is the same for every permutation of the same numbers."""
    return np.frombuffer(b"".join(encoded_varint(int(value)) for value in weight.values.reshape(-1)), np.uint8)


_MATRIX = range(2, 3)
ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding(_cast("<f4"), "f", 4),
    "float32 transposed": Encoding(_transposed(_cast("<f4")), "f", 4, ranks=_MATRIX),
    "float16": Encoding(_float16, "f", 2),
    "float16 transposed": Encoding(_transposed(_float16), "f", 2, ranks=_MATRIX),
    "onnxruntime int8 transposed": Encoding(_transposed(_onnx_int8), "f", 1, ranks=_MATRIX),
    "onnxruntime int8 scale per row": Encoding(_onnx_scales, "f", 4, per_row=True, ranks=_MATRIX),
    "coremltools float16": Encoding(_coreml_float16, "f", 2),
    "coremltools int8": Encoding(_coreml_int8, "f", 1, ranks=range(2, 9)),
    "coremltools int8 scale per row": Encoding(_coreml_scales, "f", 2, per_row=True, ranks=range(2, 9)),
    "int64": Encoding(_cast("<i8"), "i", 8),
    "int32": Encoding(_cast("<i4"), "i", 4),
    "int16": Encoding(_cast("<i2"), "i", 2),
    "uint16": Encoding(_cast("<u2"), "i", 2),
    "uint8": Encoding(_cast("u1"), "i", 1),
    "integers of a message": Encoding(_message_integers, "i", 0),
}
