"""Operators of compressed weights (``constexpr_…``), and of quantised activations.

Up to iOS 17 packed bytes come with the shape of the result; from iOS 18 on the types narrower than a byte say it,
scales and look-up tables may differ from block to block, and sparse weights may be compressed once more. The two
kinds of a name are told apart by their parameters. All compute in float32; the evaluator runs them once, when
it is built.
"""

from __future__ import annotations

import math

import numpy as np

from exporters.mil.call import Call
from exporters.mil.table import operator
from exporters.mil.types import unpacked

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@operator("constexpr_affine_dequantize", "quantized_data zero_point scale axis")
def _affine_dequantize(call: Call) -> np.ndarray:
    """scale · (data - zero point); both one number, or one for each place along ``axis``."""
    return _scaled(call, call.constant("quantized_data"))[np.newaxis]


@operator("constexpr_blockwise_shift_scale", "data scale offset", since=18)
def _blockwise_shift_scale(call: Call) -> np.ndarray:
    """scale · (data - offset), each for a block: along every axis data is a multiple of scale's length."""
    offset = call.constant("offset") if call.has("offset") else None
    return _shifted(call, call.constant("data"), call.constant("scale"), offset)[np.newaxis]


@operator("constexpr_sparse_blockwise_shift_scale", "data_mask nonzero_data scale offset", since=18)
def _sparse_blockwise_shift_scale(call: Call) -> tuple[np.ndarray, ...]:
    """As above where ``data_mask`` is 1; the mask, and the values in its order."""
    mask = call.constant("data_mask")
    data = _dense(call, mask, call.constant("nonzero_data"))
    offset = call.constant("offset") if call.has("offset") else None
    values = _shifted(call, data, call.constant("scale"), offset)
    return mask[np.newaxis], values[mask != 0][np.newaxis]


@operator("constexpr_lut_to_dense", "indices lut shape vector_axis")
def _lut_to_dense(call: Call) -> np.ndarray:
    """Indices replaced by entries of a table.

    With ``shape`` (to iOS 17): one table of 2, 4, 16, 64 or 256 values; indices of as few bits are packed in bytes.
    Without: indices in the shape of the weights, one table for each block, whose entries are vectors along
    ``vector_axis``.
    """
    lut, indices = call.constant("lut"), call.constant("indices")
    if not call.has("shape"):
        return _looked_up(call, indices, lut)[np.newaxis]
    shape, bits = call.integers("shape"), max(1, len(lut) - 1).bit_length()
    if lut.shape != (1 << bits,) or bits not in (1, 2, 4, 6, 8):
        raise call.unknown(f"has a table of the shape {lut.shape}")
    call.expect(shape)
    if indices.dtype != np.uint8 or indices.shape != ((math.prod(shape) * bits + 7) // 8,):
        raise call.unknown(f"has indices of the shape {indices.shape} for {math.prod(shape)} values")
    return lut[unpacked(indices, bits, math.prod(shape))].reshape(1, *shape)


@operator("constexpr_lut_to_sparse", "indices_mask indices_nonzero_data lut vector_axis", since=18)
def _lut_to_sparse(call: Call) -> tuple[np.ndarray, ...]:
    """Look-up where ``indices_mask`` is 1; the mask (longer along ``vector_axis``), and the values in its order."""
    mask, lut = call.constant("indices_mask"), call.constant("lut")
    values = _looked_up(call, _dense(call, mask, call.constant("indices_nonzero_data")), lut, output=None)
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], call.axis("vector_axis", mask.ndim) - 1)
    return mask[np.newaxis], values[mask != 0][np.newaxis]


@operator("constexpr_sparse_to_dense", "nonzero_data mask shape")
def _sparse_to_dense(call: Call) -> np.ndarray:
    """Values where the mask is 1, zero elsewhere; with ``shape`` (to iOS 17) the mask is packed in bytes."""
    mask = call.constant("mask")
    if call.has("shape"):
        shape = call.integers("shape")
        call.expect(shape)
        mask = unpacked(mask, 1, math.prod(shape)).reshape(shape)
    return _dense(call, mask, call.constant("nonzero_data"))[np.newaxis]


@operator("constexpr_cast", "source_val output_dtype")
def _constexpr_cast(call: Call) -> np.ndarray:
    if call.text("output_dtype", "") != "fp32":
        raise call.unknown(f"casts to {call.text('output_dtype', '')!r}")
    return call.tensor("source_val").astype(np.float32)


@operator("quantize", "input scale zero_point output_dtype axis", since=17)
def _quantize(call: Call) -> np.ndarray:
    """round(input / scale) + zero point, cut to the range of 8 bits; halves go to the even number."""
    name = call.text("output_dtype", "")
    if name not in _RANGES:
        raise call.unknown(f"quantises to {name!r}")
    x = call.tensor("input")
    levels = np.rint(x / _along(call, "scale", x.ndim - 1))
    if call.has("zero_point"):
        levels += _along(call, "zero_point", x.ndim - 1)
    return np.clip(levels, *_RANGES[name]).astype(name)


@operator("dequantize", "input scale zero_point axis", since=17)
def _dequantize(call: Call) -> np.ndarray:
    """scale · (input - zero point)."""
    return _scaled(call, call.tensor("input"), images=1)


def _scaled(call: Call, data: np.ndarray, images: int = 0) -> np.ndarray:
    result = data.astype(np.float32)
    if call.has("zero_point"):
        result -= _along(call, "zero_point", data.ndim - images)
    result *= _along(call, "scale", data.ndim - images)
    return result


def _along(call: Call, name: str, rank: int) -> np.ndarray:
    """A constant parameter as float32, one number or one for each place along the parameter ``axis`` of ``rank``."""
    value = call.constant(name).astype(np.float32)
    if value.ndim > 1:
        raise call.unknown(f"has a {name} of the shape {value.shape}")
    return value if value.size == 1 else value.reshape(-1, *(1,) * (rank - call.axis("axis", rank)))


def _blocks(call: Call, name: str, shape: tuple[int, ...], parts: tuple[int, ...]) -> None:
    """Refuse if ``parts`` do not divide ``shape`` into blocks of equal length."""
    if len(parts) != len(shape) or any(part == 0 or size % part for size, part in zip(shape, parts, strict=True)):
        raise call.unknown(f"has a {name} for {parts} blocks of {shape}")


def _shifted(call: Call, data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    _blocks(call, "scale", data.shape, scale.shape)
    if offset is not None and offset.shape != scale.shape:
        raise call.unknown(f"has an offset of the shape {offset.shape} for a scale of {scale.shape}")
    # Every axis becomes blocks × the places in one, so that scale and offset are broadcast and never repeated.
    apart = [length for size, part in zip(data.shape, scale.shape, strict=True) for length in (part, size // part)]
    along = [length for part in scale.shape for length in (part, 1)]
    result = data.reshape(apart).astype(np.float32)
    if offset is not None:
        result -= offset.astype(np.float32).reshape(along)
    result *= scale.astype(np.float32).reshape(along)
    return result.reshape(data.shape)


def _dense(call: Call, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    if values.ndim != 1 or np.count_nonzero(mask) != len(values):
        raise call.unknown(f"has {values.size} values for {np.count_nonzero(mask)} places")
    result = np.zeros(mask.shape, values.dtype)
    result[mask != 0] = values
    return result


def _looked_up(call: Call, indices: np.ndarray, lut: np.ndarray, output: int | None = 0) -> np.ndarray:
    """Entries of the table of each block; ``lut`` has two more axes than ``indices``: entries and their vectors."""
    rank, (entries, width) = indices.ndim, lut.shape[-2:]
    _blocks(call, "table", indices.shape, lut.shape[:-2])
    axis = call.axis("vector_axis", rank) - 1 if width > 1 else 0
    shape = tuple(size * (width if place == axis else 1) for place, size in enumerate(indices.shape))
    if output is not None:
        call.expect(shape, output)
    if indices.size and int(indices.max()) >= entries:
        raise call.unknown(f"looks up entry {int(indices.max())} of a table of {entries}")
    # Which table each index belongs to, then entry by entry in all tables laid side by side.
    tables = np.arange(math.prod(lut.shape[:-2])).reshape(lut.shape[:-2])
    for place, (size, part) in enumerate(zip(indices.shape, lut.shape, strict=False)):
        tables = np.repeat(tables, size // part, place)
    vectors = lut.reshape(-1, width)[tables * entries + indices]
    return np.moveaxis(vectors, -1, axis + 1).reshape(shape)
