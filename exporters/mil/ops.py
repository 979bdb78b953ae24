"""The operators of the evaluator: one function each, from a :class:`~exporters.mil.call.Call` to its result.

Arrays carry the images in front (length 1 where the value is the same for all), so axis a of the program is
axis a + 1 here. The set is what Vision Transformers of timm become in Core ML; meanings follow Apple's
description of MIL. Results may be wider than the declared type: the evaluator rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from exporters.mil.call import Call

Result = np.ndarray | tuple[np.ndarray, ...]
Operator = Callable[[Call], Result]
OPERATORS: dict[str, Operator] = {}

_CASTS: dict[str, type[np.generic]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "int16": np.int16,
    "int32": np.int32,
    "uint16": np.uint16,
    "bool": np.bool_,
}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Enter a function under the names that operators have in a program."""

    def enter(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
        return function

    return enter


def _aligned(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays with equal ranks: axes of length 1 are put behind that of the images, as broadcasting does."""
    rank = max(array.ndim for array in arrays)
    return [a.reshape(len(a), *(1,) * (rank - a.ndim), *a.shape[1:]) for a in arrays]


def _batched(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays with the same number of images, so that they can be put side by side."""
    count = max(len(array) for array in arrays)
    return [np.broadcast_to(array, (count, *array.shape[1:])) for array in arrays]


# ---- element by element -------------------------------------------------------------------------------------


def _binary(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Operator:
    def apply(call: Call) -> np.ndarray:
        return function(*_aligned(call.tensor("x"), call.tensor("y")))

    return apply


def _unary(function: Callable[[np.ndarray], np.ndarray]) -> Operator:
    def apply(call: Call) -> np.ndarray:
        return function(call.tensor("x"))

    return apply


OPERATORS.update(
    {
        "add": _binary(np.add),
        "sub": _binary(np.subtract),
        "mul": _binary(np.multiply),
        "real_div": _binary(np.divide),
        "pow": _binary(np.power),
        "maximum": _binary(np.maximum),
        "minimum": _binary(np.minimum),
        "greater": _binary(np.greater),
        "less": _binary(np.less),
        "abs": _unary(np.abs),
        "ceil": _unary(np.ceil),
        "cos": _unary(np.cos),
        "erf": _unary(special.erf),
        "exp": _unary(np.exp),
        "floor": _unary(np.floor),
        "relu": _unary(lambda x: np.maximum(x, 0)),
        "sigmoid": _unary(special.expit),
        "silu": _unary(lambda x: x * special.expit(x)),
        "sin": _unary(np.sin),
        "sqrt": _unary(np.sqrt),
        "square": _unary(np.square),
        "tanh": _unary(np.tanh),
    }
)


@operator("rsqrt")
def _rsqrt(call: Call) -> np.ndarray:
    return 1 / np.sqrt(call.tensor("x") + call.number("epsilon", 1e-12))


@operator("log")
def _log(call: Call) -> np.ndarray:
    return np.log(call.tensor("x") + call.number("epsilon", 1e-45))


@operator("clip")
def _clip(call: Call) -> np.ndarray:
    return np.clip(call.tensor("x"), call.number("alpha", -np.inf), call.number("beta", np.inf))


@operator("gelu")
def _gelu(call: Call) -> np.ndarray:
    # Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415: x·Φ(x) and its two approximations.
    x = call.tensor("x")
    mode = call.text("mode", "EXACT")
    if mode == "EXACT":
        return 0.5 * x * (1 + special.erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * special.expit(np.float32(1.702) * x)
    raise call.unknown(f"has the mode {mode!r}")


@operator("cast")
def _cast(call: Call) -> np.ndarray:
    name = call.text("dtype", "")
    if name not in _CASTS:
        raise call.unknown(f"casts to {name!r}")
    # To an integer Core ML cuts the fraction off, as NumPy does.
    return call.tensor("x").astype(_CASTS[name])


@operator("select")
def _select(call: Call) -> np.ndarray:
    return np.where(*_aligned(call.tensor("cond"), call.tensor("a"), call.tensor("b")))


def _windows(x: np.ndarray, size: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """All windows of ``size`` over ``axes``, as that many more axes behind; a view."""
    # NumPy's own stub knows one axis only, its function takes several.
    view: Callable[..., np.ndarray] = np.lib.stride_tricks.sliding_window_view
    return view(x, size, axes)


# ---- matrices and convolutions ------------------------------------------------------------------------------


@operator("linear")
def _linear(call: Call) -> np.ndarray:
    x, weight = call.tensor("x"), call.constant("weight")
    # One product of two matrices is far faster than NumPy's many small ones.
    result = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return result + call.constant("bias") if call.has("bias") else result


@operator("matmul")
def _matmul(call: Call) -> np.ndarray:
    x, y = _aligned(call.tensor("x"), call.tensor("y"))
    if min(call.tensor("x").ndim, call.tensor("y").ndim) < 3:
        raise call.unknown("multiplies a vector")
    x = x.swapaxes(-1, -2) if call.flag("transpose_x") else x
    y = y.swapaxes(-1, -2) if call.flag("transpose_y") else y
    return np.matmul(x, y)


@operator("conv")
def _conv(call: Call) -> np.ndarray:
    """Cross-correlation over any number of spatial axes: x 1×C×…, weight O×C/g×k…, bias O."""
    x, weight = call.tensor("x"), call.constant("weight")
    kernel = weight.shape[2:]
    spatial = len(kernel)
    images, groups = x.shape[:2], call.integer("groups", 1)
    x = x.reshape(-1, *x.shape[2:])
    strides = call.integers("strides") if call.has("strides") else (1,) * spatial
    dilations = call.integers("dilations") if call.has("dilations") else (1,) * spatial
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    x = np.pad(x, [(0, 0), (0, 0), *_spatial_padding(call, x.shape[2:], reach, strides)])

    axes = tuple(range(2, 2 + spatial))
    windows = _windows(x, reach, axes)
    places = tuple(slice(None, None, step) for step in strides)
    taps = tuple(slice(None, None, step) for step in dilations)
    windows = windows[(slice(None), slice(None), *places, *taps)]

    count, size = len(x), windows.shape[2 : 2 + spatial]
    windows = windows.reshape(count, groups, -1, *windows.shape[2:])
    # n, g, c, out…, k… → g, n, out…, c, k…: one matrix of patches for each group.
    order = (1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    patches = windows.transpose(order).reshape(groups, count * math.prod(size), -1)
    filters = weight.reshape(groups, len(weight) // groups, -1)
    result = np.matmul(patches, filters.swapaxes(1, 2))
    result = result.reshape(groups, count, math.prod(size), -1).transpose(1, 0, 3, 2)
    result = result.reshape(*images, len(weight), *size)
    if call.has("bias"):
        result = result + call.constant("bias").reshape(-1, *(1,) * spatial)
    return result


def _spatial_padding(
    call: Call, size: tuple[int, ...], reach: tuple[int, ...], strides: tuple[int, ...]
) -> list[tuple[int, int]]:
    kind = call.text("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(size)
    if kind == "custom":
        pad = call.integers("pad")
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise call.unknown(f"pads by {kind!r}")
    # As many outputs as strides fit into the input; the odd value goes behind ("same") or in front.
    totals = [max(0, -(-n // s) * s - s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if kind == "same" else [(after, before) for before, after in halves]


@operator("max_pool")
def _max_pool(call: Call) -> np.ndarray:
    """The largest value under each window: x 1×C×…, over the spatial axes."""
    x = call.tensor("x")
    kernel = call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else (1,) * len(kernel)
    if call.flag("ceil_mode"):
        raise call.unknown("pools over incomplete windows")
    padding = _spatial_padding(call, x.shape[3:], kernel, strides)
    x = np.pad(x, [(0, 0)] * 3 + padding, constant_values=-np.inf)
    windows = _windows(x, kernel, tuple(range(3, x.ndim)))
    places = tuple(slice(None, None, step) for step in strides)
    return windows[(slice(None),) * 3 + places].max(axis=tuple(range(x.ndim, windows.ndim)))


# ---- normalisation and reduction ----------------------------------------------------------------------------


@operator("layer_norm")
def _layer_norm(call: Call) -> np.ndarray:
    # Ba, Kiros & Hinton, "Layer Normalization", arXiv 1607.06450, eq. 3–4.
    x = call.tensor("x")
    rank = x.ndim - 1
    axes = call.axes("axes", rank) if call.has("axes") else tuple(range(1, x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    result = centred / np.sqrt(variance + call.number("epsilon", 1e-5))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(1, x.ndim)]
    if call.has("gamma"):
        result = result * call.constant("gamma").reshape(shape)
    if call.has("beta"):
        result = result + call.constant("beta").reshape(shape)
    return result


@operator("batch_norm")
def _batch_norm(call: Call) -> np.ndarray:
    # Ioffe & Szegedy, arXiv 1502.03167, with the moments of training; channels are the program's axis 1.
    x = call.tensor("x")
    shape = (-1, *(1,) * (x.ndim - 3))
    mean, variance = call.constant("mean").reshape(shape), call.constant("variance").reshape(shape)
    result = (x - mean) / np.sqrt(variance + call.number("epsilon", 1e-5))
    if call.has("gamma"):
        result = result * call.constant("gamma").reshape(shape)
    if call.has("beta"):
        result = result + call.constant("beta").reshape(shape)
    return result


@operator("softmax")
def _softmax(call: Call) -> np.ndarray:
    x = call.tensor("x")
    axis = call.integer("axis", -1) % (x.ndim - 1) + 1
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def _reduction(function: Callable[..., np.ndarray]) -> Operator:
    def apply(call: Call) -> np.ndarray:
        x = call.tensor("x")
        axes = call.axes("axes", x.ndim - 1) if call.has("axes") else tuple(range(1, x.ndim))
        return function(x, axis=axes, keepdims=call.flag("keep_dims"))

    return apply


def _l2_norm(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    return np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims))


OPERATORS.update(
    {
        "reduce_mean": _reduction(np.mean),
        "reduce_sum": _reduction(np.sum),
        "reduce_max": _reduction(np.max),
        "reduce_l2_norm": _reduction(_l2_norm),
    }
)


# ---- shape --------------------------------------------------------------------------------------------------


@operator("reshape")
def _reshape(call: Call) -> np.ndarray:
    x = call.tensor("x")
    # 0 keeps the length that the axis has, -1 takes what is left.
    shape = [x.shape[axis + 1] if n == 0 else n for axis, n in enumerate(call.integers("shape"))]
    return x.reshape(len(x), *shape)


@operator("transpose")
def _transpose(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return x.transpose(0, *call.axes("perm", x.ndim - 1))


@operator("expand_dims")
def _expand_dims(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return np.expand_dims(x, call.axes("axes", x.ndim - 1 + len(call.integers("axes"))))


@operator("squeeze")
def _squeeze(call: Call) -> np.ndarray:
    x = call.tensor("x")
    if call.has("axes"):
        return x.squeeze(call.axes("axes", x.ndim - 1))
    return x.reshape(len(x), *(n for n in x.shape[1:] if n != 1))


@operator("concat")
def _concat(call: Call) -> np.ndarray:
    values = _batched(call.tensors("values"))
    if call.flag("interleave"):
        raise call.unknown("interleaves")
    return np.concatenate(values, call.axes("axis", values[0].ndim - 1)[0])


@operator("stack")
def _stack(call: Call) -> np.ndarray:
    values = _batched(call.tensors("values"))
    return np.stack(values, call.axes("axis", values[0].ndim)[0])


@operator("split")
def _split(call: Call) -> tuple[np.ndarray, ...]:
    x = call.tensor("x")
    axis = call.axes("axis", x.ndim - 1)[0]
    if call.has("split_sizes"):
        return tuple(np.split(x, np.cumsum(call.integers("split_sizes"))[:-1], axis))
    return tuple(np.split(x, call.integer("num_splits"), axis))


@operator("slice_by_index")
def _slice_by_index(call: Call) -> np.ndarray:
    x = call.tensor("x")
    rank = x.ndim - 1
    begins, ends = call.integers("begin"), call.integers("end")
    steps = call.integers("stride") if call.has("stride") else (1,) * rank
    from_start, to_end = call.flags("begin_mask", rank), call.flags("end_mask", rank)
    single = call.flags("squeeze_mask", rank)
    index: list[slice | int] = [slice(None)]
    for axis in range(rank):
        begin = None if from_start[axis] else begins[axis]
        end = None if to_end[axis] else ends[axis]
        index.append(begins[axis] if single[axis] else slice(begin, end, steps[axis]))
    return x[tuple(index)]


@operator("gather")
def _gather(call: Call) -> np.ndarray:
    if call.integer("batch_dims", 0) != 0:
        raise call.unknown("gathers by batches")
    x = call.tensor("x")
    axis = call.integer("axis", 0) % (x.ndim - 1) + 1
    return np.take(x, call.constant("indices"), axis)


@operator("gather_along_axis")
def _gather_along_axis(call: Call) -> np.ndarray:
    x, indices = _batched([call.tensor("x"), call.tensor("indices")])
    return np.take_along_axis(x, indices, call.integer("axis", 0) % (x.ndim - 1) + 1)


@operator("tile")
def _tile(call: Call) -> np.ndarray:
    return np.tile(call.tensor("x"), (1, *call.integers("reps")))


@operator("pad")
def _pad(call: Call) -> np.ndarray:
    if call.text("mode", "constant") != "constant":
        raise call.unknown(f"pads by {call.text('mode', '')!r}")
    x, pad = call.tensor("x"), call.integers("pad")
    # Two numbers for each of the last axes; the axes before them are left alone.
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    return np.pad(x, pairs, constant_values=call.number("constant_val", 0.0))


@operator("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> np.ndarray:
    """1×C×H×W to 1×(C·b·b)×(H/b)×(W/b); channel c, row i, column j of a block goes to (c·b + i)·b + j."""
    n, one, c, h, w = call.tensor("x").shape
    b = call.integer("downscale_factor")
    blocks = call.tensor("x").reshape(n, one, c, h // b, b, w // b, b)
    return blocks.transpose(0, 1, 2, 4, 6, 3, 5).reshape(n, one, c * b * b, h // b, w // b)


@operator("pixel_shuffle")
def _pixel_shuffle(call: Call) -> np.ndarray:
    """The inverse of ``pixel_unshuffle``."""
    n, one, c, h, w = call.tensor("x").shape
    b = call.integer("upscale_factor")
    blocks = call.tensor("x").reshape(n, one, c // (b * b), b, b, h, w)
    return blocks.transpose(0, 1, 2, 5, 3, 6, 4).reshape(n, one, c // (b * b), h * b, w * b)


# ---- the classifier -----------------------------------------------------------------------------------------


@operator("classify")
def _classify(call: Call) -> tuple[np.ndarray, ...]:
    """The name of the most probable class, and the probabilities in the order of the class names."""
    probabilities = call.tensor("probabilities")
    probabilities = probabilities.reshape(len(probabilities), 1, -1)
    return call.constant("classes")[probabilities[:, 0].argmax(axis=-1)], probabilities
