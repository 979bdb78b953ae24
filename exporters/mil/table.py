"""The table of operators: what computes each, which parameters it may be given, and from which iOS on it exists.

The modules of operators (arithmetic, matrices, norms, shapes, compressed) enter their functions here;
:mod:`exporters.mil.ops` imports them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporters.mil.call import Call

Result = np.ndarray | tuple[np.ndarray, ...]
Function = Callable[[Call], Result]


@dataclass(frozen=True)
class Operator:
    """One operator.

    ``parameters`` are all that it may be given: any other is refused by name, because it could change the meaning.
    ``since`` is the first version of iOS that has it. ``moves`` says that every value of the result is a value of
    its parameters ``x`` or ``values`` (or of the program), so that there is nothing to round again.
    """

    function: Function
    parameters: frozenset[str]
    since: int
    moves: bool


OPERATORS: dict[str, Operator] = {}


def operator(name: str, parameters: str, *, since: int = 16, moves: bool = False) -> Callable[[Function], Function]:
    """Enter a function under the name of its operator; ``parameters`` are separated by spaces."""

    def enter(function: Function) -> Function:
        OPERATORS[name] = Operator(function, frozenset(parameters.split()), since, moves)
        return function

    return enter


def aligned(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays with equal ranks: axes of length 1 are put behind that of the images, as broadcasting does."""
    rank = max(array.ndim for array in arrays)
    return [a if a.ndim == rank else a.reshape(len(a), *(1,) * (rank - a.ndim), *a.shape[1:]) for a in arrays]


def side_by_side(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays with the same number of images."""
    count = max(len(array) for array in arrays)
    return [np.broadcast_to(array, (count, *array.shape[1:])) for array in arrays]
