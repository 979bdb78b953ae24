"""How firmly the order of an image's patches stands: what one pixel, or noise that nobody sees, does to it.

For each metric and size of patch, on test images: the share of images whose order changes, the share of their places
that then hold another patch, and the share whose reference (the patch of the lowest entropy) is another. And the share
of images whose reference is flat to begin with (an entropy of zero): against it every patch has the mutual information
zero and its own entropy as joint entropy, so that the one order is none at all and the other that by entropy.

Changes: one random pixel set to black or white, whichever is farther, and every value moved up or down by ε at random.
No model and no training: a network that sorts sees other patches at those places, whatever its weights are. Run::

    python -m benchmarks.order_stability --json FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.rounds import table, write_record
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.metrics import METRICS, measure
from factory.volumization.order import metric_order, reference_index
from factory.volumization.volumize import patches_of


def one_pixel(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [0, 1] with one random pixel of each, in all channels, set to 0 or 1."""
    count, _, height, width = images.shape
    rows = torch.randint(height, (count,), generator=generator)
    columns = torch.randint(width, (count,), generator=generator)
    changed, each = images.clone(), torch.arange(count)
    changed[each, :, rows, columns] = (images[each, :, rows, columns] < 0.5).float()
    return changed


def signs(images: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Images with every value moved by ε up or down, cut to [0, 1] and rounded to 8 bits."""
    up = torch.randint(2, images.shape, generator=generator) * 2 - 1
    return ((images + epsilon * up).clamp(0, 1) * 255).round() / 255


def stability(images: Tensor, changed: Tensor, side: int, metric: str) -> dict[str, float]:
    """Shares: images with another order, places with another patch, images with another reference, or a flat one."""
    before, after = patches_of(images, side), patches_of(changed, side)
    moved = metric_order(metric, before) != metric_order(metric, after)
    reference = reference_index(before)
    flat = measure("entropy", before, before[:, 0]).gather(1, reference) < 1e-6
    return {
        "orders": float(moved.any(1).float().mean()),
        "places": float(moved.float().mean()),
        "references": float((reference != reference_index(after)).float().mean()),
        "flat": float(flat.float().mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--images", type=int, default=1000, help="test images of the shipped sample")
    made.add_argument("--sides", type=int, nargs="+", default=[14, 7], help="of patches, in pixels")
    made.add_argument("--epsilon", type=float, default=8 / 255, help="of the noise, on [0, 1]")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    images = torch.from_numpy(read_idx(path)[: asked.images, np.newaxis].astype(np.float32) / 255)
    generator = torch.Generator().manual_seed(asked.seed)
    changes = {"one pixel": one_pixel(images, generator), "noise": signs(images, asked.epsilon, generator)}
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for name, changed in changes.items():
        for side in asked.sides:
            for metric in METRICS:
                found = stability(images, changed, side, metric)
                results[f"{name}, {side}, {metric}"] = found
                rows.append([name, str(side), metric, *(f"{value:.3f}" for value in found.values())])
    print(
        table(
            ["change", "patch", "metric", "orders changed", "places changed", "references changed", "references flat"],
            rows,
        )
    )
    write_record(asked.json, "order_stability", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
