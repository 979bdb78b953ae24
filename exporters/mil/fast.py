"""The hot functions of a ViT in float32: few passes, each over a piece that stays in a core's cache.

A pass over an array that does not fit into the cache costs several times one that does, and new memory costs
more than either; so every function here writes into one array made at the start and works piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# Values in a piece: 128 KB of float32, so that three of them stay in a core's second cache. Smaller ones would fit the
# first, but NumPy's own time for each pass would then cost more than is won.
_PIECE = 32_768

# erf(x) = tanh(x·p(x²)), p(x²) = atanh(erf(x))/x. The coefficients are a weighted least-squares fit of degree 8 on
# Chebyshev points of [0, 3.8], the weights moved towards the smallest largest error of erf: 2.4e-8 exactly, 1.2e-7
# as computed in float32. Beyond 3.8 erf is within 8e-8 of ±1, and p stays what it is there.
_END = 3.8
_ERF = (
    1.12837939294246,
    0.10276937213200277,
    -0.0001969207030930694,
    -0.0006094580801194949,
    7.960174918281438e-05,
    -2.7408345006004145e-06,
    -3.834551895878104e-07,
    4.416532278669803e-08,
    -1.3623674328590605e-09,
)
# GELU is x·Φ(x) with Φ(x) = (1 + erf(x/√2))/2 = 1/(1 + exp(x·q(x²))), which does not cancel for negative x.
_GELU = tuple(-2 * math.sqrt(0.5) * 0.5**power * value for power, value in enumerate(_ERF))
_ERF32 = [np.float32(value) for value in _ERF]
_GELU32 = [np.float32(value) for value in _GELU]
_ERF_END = np.float32(_END**2)
_GELU_END = np.float32(2 * _END**2)

_OVERFLOW_HALF = np.float32(65520)
_SMALLEST_NORMAL_HALF = np.float32(2.0**-14)
_EXPONENT = np.int32(0x7F800000)
# 1.5·2^13: added at the exponent of a value, it leaves ten bits behind the point.
_SHIFT = np.float32(1.5 * 2**13)

# Reads one piece, may use the second as scratch, writes the third (which may be the first).
_Piece = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of float32 values, to 1.2e-7."""
    return _by_pieces(_erf, x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x·Φ(x) of float32 values, to 1e-7 of max(1, |x|)."""
    return _by_pieces(_gelu, x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1/(1 + exp(-x)) of float32 values."""
    return _by_pieces(_sigmoid, x)


def silu(x: np.ndarray) -> np.ndarray:
    """x/(1 + exp(-x)) of float32 values."""
    return _by_pieces(_silu, x)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax of float32 values over the last axis."""
    return _by_rows(_softmax, x)


def normalised(x: np.ndarray, epsilon: np.float32) -> np.ndarray:
    """x less its mean, over the root of its variance plus ``epsilon``, both over the last axis; float32."""

    def rows(source: np.ndarray, result: np.ndarray) -> None:
        np.subtract(source, source.mean(axis=-1, keepdims=True), out=result)
        variance = np.vecdot(result, result)[..., np.newaxis]
        variance /= np.float32(source.shape[-1])
        variance += epsilon
        np.sqrt(variance, out=variance)
        result /= variance

    return _by_rows(rows, x)


def round_to_half(x: np.ndarray, *, in_place: bool) -> np.ndarray:
    """``x`` float32 rounded to the nearest float16, ties to even, as float32; what is too large becomes infinite.

    As a conversion to float16 and back, but for the sign of zero, in a fifth of the time.
    """
    contiguous = x if x.flags.c_contiguous else np.ascontiguousarray(x)
    return _by_pieces(_round_to_half, contiguous, contiguous if in_place or contiguous is not x else None)


def _by_pieces(function: _Piece, x: np.ndarray, result: np.ndarray | None = None) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    result = np.empty_like(x) if result is None else result
    source, target, scratch = x.reshape(-1), result.reshape(-1), np.empty(min(x.size, _PIECE), np.float32)
    for start in range(0, x.size, _PIECE):
        piece = source[start : start + _PIECE]
        function(piece, scratch[: len(piece)], target[start : start + _PIECE])
    return result


def _by_rows(function: Callable[[np.ndarray, np.ndarray], None], x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    result = np.empty_like(x)
    source, target = x.reshape(-1, x.shape[-1]), result.reshape(-1, x.shape[-1])
    count = max(1, _PIECE // x.shape[-1])
    for start in range(0, len(source), count):
        function(source[start : start + count], target[start : start + count])
    return result


def _horner(coefficients: list[np.float32], x: np.ndarray, end: np.float32, result: np.ndarray) -> None:
    """x·p(min(x², end)) into ``result``, which is not ``x``."""
    square = np.minimum(x * x, end)
    np.multiply(square, coefficients[-1], out=result)
    for value in coefficients[-2:0:-1]:
        result += value
        result *= square
    result += coefficients[0]
    result *= x


def _erf(x: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    _horner(_ERF32, x, _ERF_END, scratch)
    np.tanh(scratch, out=result)


def _gelu(x: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    _horner(_GELU32, x, _GELU_END, scratch)
    np.exp(scratch, out=scratch)
    scratch += 1
    np.divide(x, scratch, out=result)


def _sigmoid(x: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    np.negative(x, out=scratch)
    np.exp(scratch, out=scratch)
    scratch += 1
    np.reciprocal(scratch, out=result)


def _silu(x: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    np.negative(x, out=scratch)
    np.exp(scratch, out=scratch)
    scratch += 1
    np.divide(x, scratch, out=result)


def _softmax(x: np.ndarray, result: np.ndarray) -> None:
    np.subtract(x, x.max(axis=-1, keepdims=True), out=result)
    np.exp(result, out=result)
    result /= result.sum(axis=-1, keepdims=True)


def _round_to_half(x: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    np.abs(x, out=scratch)
    # Not the other way round: a NaN is to take this way as well.
    if not scratch.max() < _OVERFLOW_HALF:
        result[...] = x.astype(np.float16)
        return
    # A float32 added to 2^13 times its own power of two and taken away again keeps the ten bits behind its first,
    # rounded by the processor; below float16's normal numbers the power stays, as their spacing does.
    np.maximum(scratch, _SMALLEST_NORMAL_HALF, out=scratch)
    bits = scratch.view(np.int32)
    bits &= _EXPONENT
    scratch *= _SHIFT
    np.add(x, scratch, out=result)
    result -= scratch
