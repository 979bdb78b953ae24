"""Operators that find places: sorting, the largest and the smallest, vectors that mark a place.

Of equal values Core ML promises no order; here the lower index comes first. A program whose result depends on that is
not portable: it should make its keys different before it sorts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from exporters.mil.call import Call
from exporters.mil.table import operator, side_by_side


@operator("argsort", "x axis ascending")
def _argsort(call: Call) -> np.ndarray:
    x = call.tensor("x")
    return _sorted(x, call.axis("axis", x.ndim - 1, default=-1), ascending=call.flag("ascending"))


@operator("topk", "x k axis ascending sort return_indices output_indices_dtype")
def _topk(call: Call) -> np.ndarray | tuple[np.ndarray, ...]:
    """The ``k`` largest values along an axis (smallest if ``ascending``), in order, and their places."""
    x = call.tensor("x")
    axis, count = call.axis("axis", x.ndim - 1, default=-1), call.integer("k", 1)
    if not 0 < count <= x.shape[axis]:
        raise call.unknown(f"takes {count} of {x.shape[axis]} values")
    if call.has("sort") and not call.flag("sort"):
        raise call.unknown("leaves the order of its values open")
    places = np.take(_sorted(x, axis, ascending=call.flag("ascending")), np.arange(count), axis)
    values = np.take_along_axis(x, places, axis)
    return (values,) if call.has("return_indices") and not call.flag("return_indices") else (values, places)


@operator("one_hot", "indices one_hot_vector_size axis on_value off_value")
def _one_hot(call: Call) -> np.ndarray:
    """``on_value`` at the place that each index names along a new axis, ``off_value`` elsewhere."""
    indices, size = call.tensor("indices"), call.integer("one_hot_vector_size")
    axis = call.axis("axis", indices.ndim, default=-1)
    shape = indices.shape[1:]
    call.expect((*shape[: axis - 1], size, *shape[axis - 1 :]))
    marks = np.arange(size).reshape(-1, *(1,) * (indices.ndim - axis))
    on = call.constant("on_value") if call.has("on_value") else np.int32(1)
    off = call.constant("off_value") if call.has("off_value") else np.int32(0)
    return np.where(np.expand_dims(indices, axis) == marks, on, off)


def _extreme(name: str, function: Callable[..., np.ndarray]) -> None:
    @operator(name, "x axis keep_dims output_dtype")
    def apply(call: Call) -> np.ndarray:  # pyright: ignore[reportUnusedFunction]
        x = call.tensor("x")
        axis = call.axis("axis", x.ndim - 1, default=-1)
        return function(x, axis=axis, keepdims=call.flag("keep_dims"))


_extreme("reduce_argmax", np.argmax)
_extreme("reduce_argmin", np.argmin)


@operator("gather", "x indices axis batch_dims validate_indices", moves=True)
def _gather(call: Call) -> np.ndarray:
    if call.integer("batch_dims", 0) != 0:
        raise call.unknown("gathers by batches")
    x, indices = call.tensor("x"), call.tensor("indices")
    axis = call.axis("axis", x.ndim - 1, default=0)
    _check_indices(call, indices, x.shape[axis])
    call.expect((*x.shape[1:axis], *indices.shape[1:], *x.shape[axis + 1 :]))
    if len(indices) == 1:
        return np.take(x, indices[0], axis)
    if len(x) == 1:
        # The images stand where the axis was, in front of the other axes of the indices.
        return np.moveaxis(np.take(x[0], indices, axis - 1), axis - 1, 0)
    return np.stack([np.take(one, places, axis - 1) for one, places in zip(x, indices, strict=True)])


@operator("gather_along_axis", "x indices axis validate_indices", moves=True)
def _gather_along_axis(call: Call) -> np.ndarray:
    x, indices = side_by_side([call.tensor("x"), call.tensor("indices")])
    axis = call.axis("axis", x.ndim - 1, default=0)
    _check_indices(call, indices, x.shape[axis])
    # NumPy takes signed numbers only where it may have to count from the end.
    return np.take_along_axis(x, indices.astype(np.int64), axis)


def _check_indices(call: Call, indices: np.ndarray, length: int) -> None:
    """Refuse what the program's version of Core ML leaves undefined: from iOS 17 on negative indices too."""
    lowest = -length if call.target < 17 else 0
    if indices.size and not lowest <= int(indices.min()) <= int(indices.max()) < length:
        worst = int(indices.min()) if int(indices.min()) < lowest else int(indices.max())
        raise call.unknown(f"takes place {worst} of {length}, which is undefined in iOS {call.target}")


def _sorted(x: np.ndarray, axis: int, *, ascending: bool) -> np.ndarray:
    if ascending:
        return np.argsort(x, axis, kind="stable")
    # Backwards twice, so that of equal values the lower index still comes first.
    backwards = np.argsort(np.flip(x, axis), axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(backwards, axis)
