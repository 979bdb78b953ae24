"""Operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from exporters.mil.call import Call
from exporters.mil.fast import erf, gelu, sigmoid, silu
from exporters.mil.table import aligned, operator

_CASTS: dict[str, type[np.generic]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "bool": np.bool_,
}


def _binary(name: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray], *, moves: bool = False) -> None:
    @operator(name, "x y", moves=moves)
    def apply(call: Call) -> np.ndarray:  # pyright: ignore[reportUnusedFunction]
        x, y = aligned(call.tensor("x"), call.tensor("y"))
        call.expect(np.broadcast_shapes(x.shape[1:], y.shape[1:]))
        return function(x, y)


def _unary(name: str, function: Callable[[np.ndarray], np.ndarray], *, moves: bool = False) -> None:
    @operator(name, "x", moves=moves)
    def apply(call: Call) -> np.ndarray:  # pyright: ignore[reportUnusedFunction]
        return function(call.tensor("x"))


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)
_binary("real_div", np.divide)
_binary("floor_div", np.floor_divide)
_binary("mod", np.mod)
_binary("pow", np.power)
_binary("floor_div", np.floor_divide)
_binary("maximum", np.maximum)
_binary("minimum", np.minimum)
_binary("equal", np.equal)
_binary("not_equal", np.not_equal)
_binary("greater", np.greater)
_binary("greater_equal", np.greater_equal)
_binary("less", np.less)
_binary("less_equal", np.less_equal)
_binary("logical_and", np.logical_and)
_binary("logical_or", np.logical_or)
_unary("logical_not", np.logical_not)
_unary("abs", np.abs, moves=True)
_unary("ceil", np.ceil)
_unary("cos", np.cos)
_unary("erf", erf)
_unary("exp", np.exp)
_unary("floor", np.floor)
_unary("relu", lambda x: np.maximum(x, 0), moves=True)
_unary("round", np.rint)
_unary("sigmoid", sigmoid)
_unary("silu", silu)
_unary("sin", np.sin)
_unary("sqrt", np.sqrt)
_unary("square", np.square)
_unary("tanh", np.tanh)


@operator("rsqrt", "x epsilon")
def _rsqrt(call: Call) -> np.ndarray:
    return 1 / np.sqrt(call.tensor("x") + call.number("epsilon", 1e-12))


@operator("log", "x epsilon")
def _log(call: Call) -> np.ndarray:
    return np.log(call.tensor("x") + call.number("epsilon", 1e-45))


@operator("clip", "x alpha beta")
def _clip(call: Call) -> np.ndarray:
    return np.clip(call.tensor("x"), call.number("alpha", -np.inf), call.number("beta", np.inf))


@operator("prelu", "x alpha")
def _prelu(call: Call) -> np.ndarray:
    """x where it is positive, else x times the slope of its channel, the program's axis 1."""
    # He et al., "Delving Deep into Rectifiers", arXiv 1502.01852, eq. 1.
    x, alpha = call.tensor("x"), call.constant("alpha")
    if alpha.shape != x.shape[2:3] or x.ndim < 4:
        raise call.unknown(f"has slopes of the shape {alpha.shape} for an x of {x.shape[1:]}")
    return np.where(x > 0, x, x * alpha.reshape(-1, *(1,) * (x.ndim - 3)))


@operator("leaky_relu", "x alpha")
def _leaky_relu(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return np.where(x > 0, x, x * call.number("alpha", 0.01))


@operator("relu6", "x")
def _relu6(call: Call) -> np.ndarray:
    return np.clip(call.tensor("x"), 0, np.float32(6))


@operator("thresholded_relu", "x alpha")
def _thresholded_relu(call: Call) -> np.ndarray:
    """x where it is at least alpha, else zero."""
    x = call.tensor("x")
    return np.where(x >= call.number("alpha", 1.0), x, np.float32(0))


@operator("sigmoid_hard", "x alpha beta")
def _sigmoid_hard(call: Call) -> np.ndarray:
    """max(0, min(1, alpha·x + beta)); a hard swish is x times this with 1/6 and 1/2."""
    return np.clip(call.tensor("x") * call.number("alpha", 0.2) + call.number("beta", 0.5), 0, np.float32(1))


@operator("gelu", "x mode")
def _gelu(call: Call) -> np.ndarray:
    # Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415: x·Φ(x) and its two approximations.
    x = call.tensor("x")
    mode = call.text("mode", "EXACT")
    if mode == "EXACT":
        return gelu(x)
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    raise call.unknown(f"has the mode {mode!r}")


@operator("cast", "x dtype")
def _cast(call: Call) -> np.ndarray:
    name = call.text("dtype", "")
    if name not in _CASTS:
        raise call.unknown(f"casts to {name!r}")
    # To an integer Core ML cuts the fraction off, as NumPy does.
    return call.tensor("x").astype(_CASTS[name])


@operator("select", "cond a b")
def _select(call: Call) -> np.ndarray:
    cond, a, b = aligned(call.tensor("cond"), call.tensor("a"), call.tensor("b"))
    call.expect(np.broadcast_shapes(cond.shape[1:], a.shape[1:], b.shape[1:]))
    return np.where(cond, a, b)
