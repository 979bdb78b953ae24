"""How long one image takes on this device: batch 1, after a warm-up, median and 95th percentile.

Rules of this module: numpy only; the clock is handed in; the time of one run is the whole call, with the
copy of the image into the runtime and of the logits out of it, because an application pays for them too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporters.runtime import Runtime

WARM_UP = 5
RUNS = 50


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image; ``p95_ms`` is the smallest time that 95 % of the runs stay within."""

    median_ms: float
    p95_ms: float
    runs: int
    warm_up: int

    def to_json(self) -> dict[str, object]:
        """Plain JSON types; ``batch`` is written for readers who don't know that it is always 1."""
        return {
            "median_ms": self.median_ms,
            "p95_ms": self.p95_ms,
            "runs": self.runs,
            "warm_up": self.warm_up,
            "batch": 1,
        }


def measure_latency(
    runtime: Runtime,
    image: np.ndarray,
    *,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Latency:
    """Time ``runs`` ≥ 1 calls on ``image`` (float32 1, C, H, W in [0, 1]) after ``warm_up`` untimed ones.

    ``clock`` returns nanoseconds and never goes back.
    """
    for _ in range(warm_up):
        runtime.logits(image)
    times = np.empty(runs)
    for run in range(runs):
        start = clock()
        runtime.logits(image)
        times[run] = clock() - start
    return Latency(
        median_ms=float(np.median(times)) / 1e6,
        p95_ms=float(np.percentile(times, 95, method="inverted_cdf")) / 1e6,
        runs=runs,
        warm_up=warm_up,
    )
