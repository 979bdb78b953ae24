"""Operators that move values and compute none, and the classifier that names the most probable class."""

from __future__ import annotations

import math

import numpy as np

from exporters.mil.call import Call
from exporters.mil.table import operator, side_by_side


@operator("reshape", "x shape", moves=True)
def _reshape(call: Call) -> np.ndarray:
    x = call.tensor("x")
    # 0 keeps the length of the axis at the same place from the end (the only way to read it where ranks differ,
    # from iOS 17 on; before, ranks are the same), -1 takes what is left.
    wanted = call.integers("shape")
    shape = [
        n if n != 0 else (x.shape[place] if -place < x.ndim else 1)
        for place, n in zip(range(-len(wanted), 0), wanted, strict=True)
    ]
    return x.reshape(len(x), *shape)


@operator("transpose", "x perm", moves=True)
def _transpose(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return x.transpose(0, *call.axes("perm", x.ndim - 1))


@operator("expand_dims", "x axes", moves=True)
def _expand_dims(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return np.expand_dims(x, call.axes("axes", x.ndim - 1 + len(call.integers("axes"))))


@operator("squeeze", "x axes", moves=True)
def _squeeze(call: Call) -> np.ndarray:
    x = call.tensor("x")
    if call.has("axes"):
        return x.squeeze(call.axes("axes", x.ndim - 1))
    return x.reshape(len(x), *(n for n in x.shape[1:] if n != 1))


@operator("concat", "values axis interleave", moves=True)
def _concat(call: Call) -> np.ndarray:
    values = side_by_side(call.tensors("values"))
    if call.flag("interleave"):
        raise call.unknown("interleaves")
    return np.concatenate(values, call.axis("axis", values[0].ndim - 1))


@operator("stack", "values axis", moves=True)
def _stack(call: Call) -> np.ndarray:
    values = side_by_side(call.tensors("values"))
    return np.stack(values, call.axis("axis", values[0].ndim))


@operator("split", "x axis num_splits split_sizes", moves=True)
def _split(call: Call) -> tuple[np.ndarray, ...]:
    x = call.tensor("x")
    axis = call.axis("axis", x.ndim - 1)
    if call.has("split_sizes"):
        sizes = call.integers("split_sizes")
        if sum(sizes) != x.shape[axis] or min(sizes) < 0:
            raise call.unknown(f"splits {x.shape[axis]} places into {sizes}")
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))
    count = call.integer("num_splits")
    if count != len(call.operation.outputs):
        raise call.unknown(f"splits into {count}")
    return tuple(np.split(x, count, axis))


@operator("slice_by_index", "x begin end stride begin_mask end_mask squeeze_mask", moves=True)
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


@operator("tile", "x reps", moves=True)
def _tile(call: Call) -> np.ndarray:
    x, times = call.tensor("x"), call.integers("reps")
    call.expect(tuple(n * k for n, k in zip(x.shape[1:], times, strict=True)))
    return np.tile(x, (1, *times))


@operator("pad", "x pad mode constant_val")
def _pad(call: Call) -> np.ndarray:
    if call.text("mode", "constant") != "constant":
        raise call.unknown(f"pads by {call.text('mode', '')!r}")
    x, pad = call.tensor("x"), call.integers("pad")
    # Two numbers for each of the last axes; the axes before them are left alone.
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    if len(pairs) != x.ndim or pairs[0] != (0, 0) or any(min(pair) < 0 for pair in pairs):
        raise call.unknown(f"pads {x.shape[1:]} by {pad}")
    call.expect(tuple(n + before + after for n, (before, after) in zip(x.shape, pairs, strict=True))[1:])
    return np.pad(x, pairs, constant_values=call.number("constant_val", 0.0))


@operator("pixel_unshuffle", "x downscale_factor", moves=True)
def _pixel_unshuffle(call: Call) -> np.ndarray:
    """1×C×H×W to 1×(C·b·b)×(H/b)×(W/b); channel c, row i, column j of a block goes to (c·b + i)·b + j."""
    n, one, c, h, w = call.tensor("x").shape
    b = call.integer("downscale_factor")
    blocks = call.tensor("x").reshape(n, one, c, h // b, b, w // b, b)
    return blocks.transpose(0, 1, 2, 4, 6, 3, 5).reshape(n, one, c * b * b, h // b, w // b)


@operator("pixel_shuffle", "x upscale_factor", moves=True)
def _pixel_shuffle(call: Call) -> np.ndarray:
    """The inverse of ``pixel_unshuffle``."""
    n, one, c, h, w = call.tensor("x").shape
    b = call.integer("upscale_factor")
    blocks = call.tensor("x").reshape(n, one, c // (b * b), b, b, h, w)
    return blocks.transpose(0, 1, 2, 5, 3, 6, 4).reshape(n, one, c // (b * b), h * b, w * b)


@operator("classify", "probabilities classes")
def _classify(call: Call) -> tuple[np.ndarray, ...]:
    """The name of the most probable class, and the probabilities in the order of the class names."""
    probabilities = call.tensor("probabilities")
    probabilities = probabilities.reshape(len(probabilities), 1, -1)
    classes = call.constant("classes")
    if classes.shape != (math.prod(probabilities.shape[1:]),):
        raise call.unknown(f"has {classes.size} classes for {math.prod(probabilities.shape[1:])} probabilities")
    return classes[probabilities[:, 0].argmax(axis=-1)], probabilities
