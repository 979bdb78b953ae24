"""Operators that multiply matrices, and those that move a window: linear, attention, convolution, pooling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from exporters.mil.call import Call
from exporters.mil.fast import softmax
from exporters.mil.program import LARGEST_TENSOR
from exporters.mil.table import aligned, operator


@operator("linear", "x weight bias")
def _linear(call: Call) -> np.ndarray:
    x, weight = call.tensor("x"), call.constant("weight")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise call.unknown(f"has a weight of the shape {weight.shape} for an x of {x.shape[1:]}")
    call.expect((*x.shape[1:-1], len(weight)))
    # One product of two matrices is far faster than NumPy's many small ones.
    result = x.reshape(-1, x.shape[-1]) @ weight.T
    if call.has("bias"):
        result += call.constant("bias")
    return result.reshape(*x.shape[:-1], len(weight))


@operator("matmul", "x y transpose_x transpose_y")
def _matmul(call: Call) -> np.ndarray:
    if min(call.tensor("x").ndim, call.tensor("y").ndim) < 3:
        raise call.unknown("multiplies a vector")
    x, y = aligned(call.tensor("x"), call.tensor("y"))
    x = x.swapaxes(-1, -2) if call.flag("transpose_x") else x
    y = y.swapaxes(-1, -2) if call.flag("transpose_y") else y
    call.expect((*np.broadcast_shapes(x.shape[1:-2], y.shape[1:-2]), x.shape[-2], y.shape[-1]))
    return np.matmul(x, y)


@operator("scaled_dot_product_attention", "query key value attn_mask", since=18)
def _attention(call: Call) -> np.ndarray:
    """softmax(q·kᵀ/√E + mask)·v; a mask of truth values hides where it is false."""
    # Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, eq. 1.
    query, key, value = call.tensor("query"), call.tensor("key"), call.tensor("value")
    if not query.ndim == key.ndim == value.ndim or query.shape[1:-2] != key.shape[1:-2]:
        raise call.unknown(f"has a query of {query.shape[1:]} for a key of {key.shape[1:]}")
    if math.prod(query.shape[1:-1]) * key.shape[-2] > LARGEST_TENSOR:
        raise call.unknown(f"attends from {query.shape[1:]} to {key.shape[1:]}, too much to hold")
    scale = np.float32(1 / math.sqrt(query.shape[-1]))
    scores = np.matmul(query * scale, key.swapaxes(-1, -2))
    if call.has("attn_mask"):
        _, mask = aligned(scores, call.tensor("attn_mask"))
        scores = scores + (np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == np.bool_ else mask)
    return np.matmul(softmax(scores), value)


@operator("conv", "x weight bias strides pad_type pad dilations groups")
def _conv(call: Call) -> np.ndarray:
    """Cross-correlation over any number of spatial axes: x 1×C×…, weight O×C/g×k…, bias O."""
    x, weight = call.tensor("x"), call.constant("weight")
    kernel = weight.shape[2:]
    spatial = len(kernel)
    images, groups = x.shape[:2], call.integer("groups", 1)
    x = x.reshape(-1, *x.shape[2:])
    strides = call.integers("strides") if call.has("strides") else (1,) * spatial
    dilations = call.integers("dilations") if call.has("dilations") else (1,) * spatial
    if min((*strides, *dilations, groups)) < 1:
        raise call.unknown(f"has the strides {strides}, dilations {dilations} and {groups} groups")
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    padding = _spatial_padding(call, x.shape[2:], reach, strides)
    size = _places(call, x.shape[2:], padding, reach, strides)
    call.expect((*images[1:], len(weight), *size))
    if any(pair != (0, 0) for pair in padding):
        x = np.pad(x, [(0, 0), (0, 0), *padding])

    windows = _windows(x, reach, tuple(range(2, 2 + spatial)))
    places = tuple(slice(None, None, step) for step in strides)
    taps = tuple(slice(None, None, step) for step in dilations)
    windows = windows[(slice(None), slice(None), *places, *taps)]

    count = len(x)
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


@operator("max_pool", "x kernel_sizes strides pad_type pad ceil_mode")
def _max_pool(call: Call) -> np.ndarray:
    """The largest value under each window: x 1×C×…, over the spatial axes."""
    x = call.tensor("x")
    kernel = call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else (1,) * len(kernel)
    if call.flag("ceil_mode") or min(*kernel, *strides) < 1:
        raise call.unknown(f"pools over incomplete windows, or over {kernel} at every {strides}")
    padding = _spatial_padding(call, x.shape[3:], kernel, strides)
    call.expect((*x.shape[1:3], *_places(call, x.shape[3:], padding, kernel, strides)))
    x = np.pad(x, [(0, 0)] * 3 + padding, constant_values=-np.inf)
    windows = _windows(x, kernel, tuple(range(3, x.ndim)))
    places = tuple(slice(None, None, step) for step in strides)
    return windows[(slice(None),) * 3 + places].max(axis=tuple(range(x.ndim, windows.ndim)))


@operator("avg_pool", "x kernel_sizes strides pad_type pad exclude_padding_from_average ceil_mode")
def _avg_pool(call: Call) -> np.ndarray:
    """The mean under each window: x 1×C×…, over the spatial axes; padding counts as zeros, or not at all."""
    x = call.tensor("x")
    kernel = call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else (1,) * len(kernel)
    if call.flag("ceil_mode") or min(*kernel, *strides) < 1:
        raise call.unknown(f"pools over incomplete windows, or over {kernel} at every {strides}")
    padding = _spatial_padding(call, x.shape[3:], kernel, strides)
    call.expect((*x.shape[1:3], *_places(call, x.shape[3:], padding, kernel, strides)))
    spatial = tuple(range(3, x.ndim))
    places = (slice(None),) * 3 + tuple(slice(None, None, step) for step in strides)

    def summed(values: np.ndarray) -> np.ndarray:
        windows = _windows(np.pad(values, [(0, 0)] * 3 + padding), kernel, spatial)[places]
        return windows.sum(axis=tuple(range(values.ndim, windows.ndim)))

    if not call.flag("exclude_padding_from_average"):
        return summed(x) / np.float32(math.prod(kernel))
    return summed(x) / summed(np.ones((1, 1, 1, *x.shape[3:]), np.float32))


def _windows(x: np.ndarray, size: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """All windows of ``size`` over ``axes``, as that many more axes behind; a view."""
    # NumPy's own stub knows one axis only, its function takes several.
    view: Callable[..., np.ndarray] = np.lib.stride_tricks.sliding_window_view
    return view(x, size, axes)


def _places(
    call: Call,
    size: tuple[int, ...],
    padding: list[tuple[int, int]],
    reach: tuple[int, ...],
    strides: tuple[int, ...],
) -> tuple[int, ...]:
    """How many windows fit along each spatial axis."""
    if any(before < 0 or after < 0 for before, after in padding):
        raise call.unknown(f"pads by {padding}")
    rooms = [n + before + after - r for n, (before, after), r in zip(size, padding, reach, strict=True)]
    if min(rooms) < 0:
        raise call.unknown(f"has a window of {reach} for {size}")
    return tuple(room // step + 1 for room, step in zip(rooms, strides, strict=True))


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
