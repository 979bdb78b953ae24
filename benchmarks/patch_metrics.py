"""The metrics of patches for a whole batch at once, beside a loop over patches in NumPy that gives the same values.

The loop is written as the definitions read, one patch at a time, with numpy.histogram and numpy.histogram2d. Both sides
get the same images as floats in [0, 1]: the shipped Fashion-MNIST sample in patches of 7 pixels, and noise of the size
of CIFAR-10 in patches of 8. Each metric is timed alone, and so is what sorting takes in all: finding the reference, the
metric against it, and the order. Exits with 1 unless the values agree within 2e-6. Run::

    python -m benchmarks.patch_metrics --json FILE
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rounds import Spent, cpu_ratio, interleaved, seconds, table, wall_ratio, write_record
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.histograms import BINS
from factory.volumization.metrics import METRICS, measure
from factory.volumization.order import metric_order
from factory.volumization.volumize import patches_of

TOLERANCE = 2e-6
REPEATS = 20
"""The batch is measured so many times in a row, because once takes a millisecond."""
SORTED = "mutual-information"
_EDGES = np.linspace(0, 256, BINS + 1)


def entropy(found: np.ndarray) -> float:
    """Entropy in nats of counts."""
    shares = found[found > 0] / found.sum()
    return float(-(shares * np.log(shares)).sum())


def quantised(values: np.ndarray) -> np.ndarray:
    """8-bit levels, float64, of values in [0, 1]."""
    return np.rint(values.astype(np.float64) * 255)


def _entropy_of(x: np.ndarray, r: np.ndarray) -> float:
    return entropy(np.histogram(x, _EDGES)[0])


def _joint_entropy(x: np.ndarray, r: np.ndarray) -> float:
    return entropy(np.histogram2d(x, r, (_EDGES, _EDGES))[0].reshape(-1))


def _mutual_information(x: np.ndarray, r: np.ndarray) -> float:
    return _entropy_of(x, r) + _entropy_of(r, x) - _joint_entropy(x, r)


def _kl(x: np.ndarray, r: np.ndarray) -> float:
    p, q = ((np.histogram(values, _EDGES)[0] + 1) / (len(values) + BINS) for values in (x, r))
    return float((p * np.log(p / q)).sum())


def _mse(x: np.ndarray, r: np.ndarray) -> float:
    return float(np.square((x - r) / 255).mean())


def _psnr(x: np.ndarray, r: np.ndarray) -> float:
    return 10 * math.log10(1 / max(_mse(x, r), 0.5 / 255**2 / len(x)))


def _max_norm(x: np.ndarray, r: np.ndarray) -> float:
    return float(np.abs(x - r).max()) / 255


LITERAL: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "entropy": _entropy_of, "mutual-information": _mutual_information, "kl": _kl, "psnr": _psnr,
    "max-norm": _max_norm, "joint-entropy": _joint_entropy, "mse": _mse,
}  # fmt: skip


def by_loop(name: str, patches: np.ndarray, references: np.ndarray) -> np.ndarray:
    """A metric of patches (B, N, P) in [0, 1] against references (B, P), one after the other: float64 (B, N)."""
    function = LITERAL[name]
    return np.array(
        [[function(quantised(x), quantised(r)) for x in row] for row, r in zip(patches, references, strict=True)]
    )


def order_by_loop(patches: np.ndarray) -> np.ndarray:
    """The order of patches (B, N, P) in [0, 1] by :data:`SORTED` against the patch of the lowest entropy: (B, N)."""
    lowest = by_loop("entropy", patches, patches[:, 0]).argmin(1)
    references = patches[np.arange(len(patches)), lowest]
    return by_loop(SORTED, patches, references).argsort(axis=1, kind="stable")


def batches(count: int, seed: int) -> dict[str, tuple[np.ndarray, int]]:
    """Images uint8 (B, C, H, W) and the side of a patch, by what they are."""
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    noise = np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), np.uint8)
    return {"28×28, patches of 7": (read_idx(path)[:count, np.newaxis], 7), "3×32×32, patches of 8": (noise, 8)}


def both(name: str, images: np.ndarray, side: int) -> dict[str, Callable[[], np.ndarray]]:
    """A metric, or the whole order, of all patches of ``images``: by the loop and for the batch at once."""
    patches = patches_of(torch.from_numpy(images).float() / 255, side).contiguous()  # as the loop has them
    flat = patches.flatten(2).numpy()

    def batch() -> np.ndarray:
        for _ in range(REPEATS):
            found = metric_order(SORTED, patches) if name == "order" else measure(name, patches, patches[:, 0])
        return found.numpy()

    return {"loop": lambda: order_by_loop(flat) if name == "order" else by_loop(name, flat, flat[:, 0]), "batch": batch}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record; 1 if a value differs."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--images", type=int, default=128, help="images in a batch")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    largest = 0.0
    for title, (images, side) in batches(asked.images, asked.seed).items():
        for name in (*METRICS, "order"):
            cases = both(name, images, side)
            cases["batch"]()  # the first run makes tables
            spent, values = interleaved(cases, asked.rounds)
            spent["batch"] = [Spent(one.wall / REPEATS, one.cpu / REPEATS) for one in spent["batch"]]
            if name == "order":
                # Patches whose scores differ by less than rounding may change places in the loop.
                same = float((values["loop"] == values["batch"]).mean())
                agreement = f"{same:.4f} of places equal"
            else:
                difference = float(np.abs(values["loop"] - values["batch"]).max())
                largest, agreement = max(largest, difference), f"{difference:.0e}"
            faster = wall_ratio(spent["loop"], spent["batch"])
            cpu = cpu_ratio(spent["loop"], spent["batch"])
            shown = [f"{1e3 * seconds(spent[case]):.2f}" for case in ("loop", "batch")]
            rows.append([title, name, *shown, str(faster), str(cpu), agreement])
            results[f"{title}, {name}"] = {"faster": faster, "cpu": cpu, "seconds": spent, "agreement": agreement}
    headings = ["images", "metric", "loop ms", "batch ms", "times as fast", "by CPU time", "largest difference"]
    print(table(headings, rows))
    print(f"Goal 50: {sum(float(row[4].split()[0]) >= 50 for row in rows)} of {len(rows)} rows reach it.")
    write_record(asked.json, "patch_metrics", asked, results)
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
