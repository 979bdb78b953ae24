"""A weight with its low-rank update added, the same bits on every machine: factory and devices merge with it.

The update B·A is summed in float64, one rank after the other, by element-wise operations only. A matrix product would
be faster, but libraries sum in an order of their own, which changes with the processor and the number of threads. The
product of two float32 values is exact in float64, so fused multiply-add changes nothing either.

>>> merged(np.ones((2, 3), np.float32), np.array([[1, 2, 3]], np.float32), np.array([[1], [0.5]], np.float32))
array([[2. , 3. , 4. ],
       [1.5, 2. , 2.5]], dtype=float32)
"""

from __future__ import annotations

import numpy as np

# Two float64 buffers of this many values stay in a core's own cache.
_CHUNK_VALUES = 2**15


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``weight`` + ``b``·``a``, float32 and rounded once, in the shape of ``weight``.

    ``weight``: float32 (out, …), taken as a matrix of ``out`` rows; ``a``: float32 (r, …) with as many values per row;
    ``b``: float32 (out, r, …) with r values per row, with the scaling in it. Raises ``ValueError`` for other shapes.
    """
    matrix = weight.reshape(len(weight), -1)
    rank = len(a)
    rows, columns = matrix.shape
    right = a.reshape(rank, columns).astype(np.float64)
    left = b.reshape(rows, rank).astype(np.float64)
    result = np.empty_like(matrix, dtype=np.float32)
    step = max(1, _CHUNK_VALUES // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        delta = np.zeros((part.stop - start, columns))
        product = np.empty_like(delta)
        for k in range(rank):
            np.multiply(left[part, k, None], right[k], out=product)
            delta += product
        delta += matrix[part]
        result[part] = delta
    return result.reshape(weight.shape)
