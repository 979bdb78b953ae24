"""Does an order that a paper claims hold here? Decided by paired intervals on the same images, never by eye.

>>> import numpy as np
>>> weak, middle, strong = (np.arange(200) < right for right in (20, 90, 160))
>>> order_verdict([weak, middle, strong]), order_verdict([weak, middle, middle]), order_verdict([strong, weak])
('holds', 'holds in trend', 'does not hold')
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from device_tests.statistics import Pairs

Verdict = Literal["holds", "holds in trend", "does not hold"]


def gain(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Share of ``second`` (bool N) minus that of ``first`` on the same images, and its 95 % interval (Newcombe)."""
    pairs = Pairs.of(second, first)
    return (pairs.difference, *pairs.interval)


def order_verdict(right: Sequence[np.ndarray]) -> Verdict:
    """Whether the shares of ``right`` (bool N each, on the same images) rise as listed.

    It holds if every one is above the one before, with an interval that leaves out 0. It holds in trend if the last is
    so above the first, and none is so below the one before. Raises ``ValueError`` for fewer than two.
    """
    if len(right) < 2:
        raise ValueError("an order takes two or more")
    steps = [gain(first, second) for first, second in pairwise(right)]
    if all(low > 0 for _, low, _ in steps):
        return "holds"
    if gain(right[0], right[-1])[1] > 0 and all(high >= 0 for _, _, high in steps):
        return "holds in trend"
    return "does not hold"
