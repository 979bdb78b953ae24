"""Operators that normalise or reduce over axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from exporters.mil.call import Call
from exporters.mil.fast import normalised, softmax
from exporters.mil.table import operator


@operator("layer_norm", "x axes gamma beta epsilon")
def _layer_norm(call: Call) -> np.ndarray:
    # Ba, Kiros & Hinton, "Layer Normalization", arXiv 1607.06450, eq. 3–4.
    x = call.tensor("x")
    axes = call.axes("axes", x.ndim - 1) if call.has("axes") else tuple(range(1, x.ndim))
    # The axes to normalise over go behind and become one.
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    order = (*others, *sorted(axes))
    moved = x.transpose(order)
    flat = moved.reshape(*moved.shape[: len(others)], -1)
    result = normalised(flat, call.number("epsilon", 1e-5))
    if call.has("gamma"):
        result *= call.constant("gamma").reshape(-1)
    if call.has("beta"):
        result += call.constant("beta").reshape(-1)
    return result.reshape(moved.shape).transpose(np.argsort(order))


@operator("batch_norm", "x mean variance gamma beta epsilon")
def _batch_norm(call: Call) -> np.ndarray:
    # Ioffe & Szegedy, arXiv 1502.03167, with the moments of training; channels are the program's axis 1.
    x = call.tensor("x")
    shape = (-1, *(1,) * (x.ndim - 3))
    mean, variance = call.constant("mean").reshape(shape), call.constant("variance").reshape(shape)
    result = x - mean
    result /= np.sqrt(variance + call.number("epsilon", 1e-5))
    if call.has("gamma"):
        result *= call.constant("gamma").reshape(shape)
    if call.has("beta"):
        result += call.constant("beta").reshape(shape)
    return result


@operator("softmax", "x axis")
def _softmax(call: Call) -> np.ndarray:
    x = call.tensor("x")
    axis = call.axis("axis", x.ndim - 1, default=-1)
    return softmax(x.swapaxes(axis, -1)).swapaxes(axis, -1)


def _reduction(name: str, function: Callable[..., np.ndarray], *, moves: bool = False) -> None:
    @operator(name, "x axes keep_dims", moves=moves)
    def apply(call: Call) -> np.ndarray:  # pyright: ignore[reportUnusedFunction]
        x = call.tensor("x")
        axes = call.axes("axes", x.ndim - 1) if call.has("axes") else tuple(range(1, x.ndim))
        return function(x, axis=axes, keepdims=call.flag("keep_dims"))


def _l2_norm(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    return np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims))


def _log_sum_exp(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    # Less the largest value first, so that the exponentials do not overflow.
    largest = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    return total if keepdims else total.squeeze(axis)


_reduction("reduce_mean", np.mean)
_reduction("reduce_sum", np.sum)
_reduction("reduce_max", np.max, moves=True)
_reduction("reduce_min", np.min, moves=True)
_reduction("reduce_log_sum_exp", _log_sum_exp)
_reduction("reduce_l2_norm", _l2_norm)
