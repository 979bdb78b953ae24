"""Whether sorting patches hides gradients: small networks on sorted, keyed and unsorted volumes under three attacks.

Every arm is trained alike on the shipped Fashion-MNIST sample, from the same seed, for a few minutes at most: this
shows how attacks compare on one model, not how good a model can be. For each arm: parameters, time of a training step,
clean accuracy under both rules for one prediction, and the share of correctly classified test images fooled at ε by
attacks of the same number of gradients: PGD (best of as many restarts), the order held at the clean image's, and the
search for orders. If the last fools clearly more than the first, sorting masks gradients. Run::

    python -m benchmarks.sorted_patches --json FILE
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rounds import shown, table, write_record
from device_tests.attacks.order_flip import OrderFlip
from device_tests.attacks.pgd import PGD
from device_tests.evidence import Proportion
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.networks import AGGREGATES, build_network
from factory.volumization.patch_loss import patch_aggregate_loss
from factory.volumization.volumize import Volumize
from keys.permutation import permutation

ARMS = (
    ("vgg2d", None), ("vgg3d", "raster"), ("vgg3d", "key"), ("vgg3d", "entropy"), ("vgg3d", "mse"),
    ("vgg3d", "mutual-information"),
)  # fmt: skip


class Arm(nn.Module):
    """Transform, normalisation and network, with the order within reach."""

    def __init__(self, kind: str, order: str | None, asked: argparse.Namespace) -> None:
        super().__init__()
        patches = 1 if order is None else (28 // asked.side) ** 2
        order_of_key = permutation(bytes(range(32)), patches) if order == "key" else None
        self.volumize = None if order is None else Volumize(asked.side, order, permutation=order_of_key)
        self.network = build_network(
            kind,
            channels=1,
            patches=patches,
            side=28 if order is None else asked.side,
            classes=10,
            width=asked.width,
            depth_kernel=None if order is None else asked.depth_kernel,
        )

    def orders(self, images: Tensor) -> Tensor:
        """The order of each image's patches."""
        assert self.volumize is not None
        return self.volumize.orders(images)

    def held(self, images: Tensor, orders: Tensor) -> Tensor:
        """Logits with the order held."""
        assert self.volumize is not None
        return self.network(normalised(self.volumize.held(images, orders)))

    def patch_logits(self, images: Tensor) -> Tensor:
        """Logits of each patch."""
        return self.network.patch_logits(normalised(images if self.volumize is None else self.volumize(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return AGGREGATES[self.network.aggregate](self.patch_logits(images))


def normalised(values: Tensor) -> Tensor:
    """Fashion-MNIST's mean and deviation."""
    return (values - 0.286) / 0.353


def sample(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images float in [0, 1] and labels of the shipped sample."""
    images, labels = (find_idx(SAMPLE, f"{split}-{stem}") for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    assert images is not None
    assert labels is not None
    pixels, classes = read_idx(images)[:count, np.newaxis], read_idx(labels)[:count]
    return torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(classes.astype(np.int64))


def trained(arm: Arm, asked: argparse.Namespace) -> float:
    """Train, and give the mean time of a step in seconds of CPU time."""
    images, labels = sample("train", asked.train_images)
    steps = asked.epochs * -(-len(images) // asked.batch)
    optimiser = torch.optim.AdamW(arm.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(asked.seed)
    arm.train()
    started = time.process_time()
    for _ in range(asked.epochs):
        for part in torch.randperm(len(images), generator=generator).split(asked.batch):
            loss = patch_aggregate_loss(arm.patch_logits(images[part]), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    arm.eval()
    return (time.process_time() - started) / steps


@torch.no_grad()
def right(arm: Arm, images: Tensor, labels: Tensor) -> Tensor:
    """Which 8-bit images the arm classifies correctly."""
    parts = [arm((part * 255).round() / 255).argmax(1) for part in images.split(100)]
    return torch.cat(parts) == labels


def fooled(arm: Arm, images: Tensor, labels: Tensor, asked: argparse.Namespace) -> dict[str, Proportion]:
    """Shares of the images, all classified correctly, that each attack fools."""
    budget = {"steps": asked.steps, "climbs": asked.climbs}
    still = torch.ones(len(images), dtype=torch.bool)
    for climb in range(asked.climbs):
        found = PGD(asked.steps).generate(arm, images, labels, epsilon=asked.epsilon, seed=asked.seed + climb)
        still &= right(arm, found, labels)
    results = {"pgd": Proportion(int((~still).sum()), len(images))}
    if arm.volumize is None:
        return results
    for attack in (
        OrderFlip(arm.orders, arm.held, holding="clean", **budget),
        OrderFlip(arm.orders, arm.held, holding="candidate", **budget),
    ):
        found = attack.generate(arm, images, labels, epsilon=asked.epsilon, seed=asked.seed)
        results[attack.name] = Proportion(int((~right(arm, found, labels)).sum()), len(images))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Train, attack, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--train-images", type=int, default=4000)
    made.add_argument("--test-images", type=int, default=1000, help="for clean accuracy")
    made.add_argument("--images", type=int, default=100, help="attacked, of those classified correctly")
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--batch", type=int, default=50)
    made.add_argument("--width", type=int, default=8)
    made.add_argument("--side", type=int, default=14, help="of a patch")
    made.add_argument("--depth-kernel", type=int, help="patches that a kernel spans; all if not given")
    made.add_argument("--epsilon", type=float, default=0.06)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--climbs", type=int, default=4)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    images, labels = sample("t10k", asked.test_images)
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for kind, order in ARMS:
        torch.manual_seed(asked.seed)
        arm = Arm(kind, order, asked)
        step = trained(arm, asked)
        clean: dict[str, Proportion] = {}
        for rule in reversed(AGGREGATES):
            arm.network.aggregate = rule
            clean[rule] = Proportion(int(right(arm, images, labels).sum()), len(images))
        chosen = right(arm, images, labels).nonzero()[: asked.images, 0]
        found = fooled(arm, images[chosen], labels[chosen], asked) if len(chosen) else {}
        parameters = sum(parameter.numel() for parameter in arm.parameters())
        name = kind if order is None else f"{kind}, {order}"
        results[name] = {"parameters": parameters, "seconds_per_step": step, "clean": clean, "fooled": found}
        rows.append([
            name, str(parameters), f"{1e3 * step:.0f}", *(f"{clean[rule].value:.3f}" for rule in AGGREGATES),
            *(shown(found[attack]) if attack in found else "" for attack in ("pgd", "order-clean", "order-flip")),
        ])  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    headings = ["arm", "parameters", "CPU ms a step", *(f"clean, {rule}" for rule in AGGREGATES)]
    print(table([*headings, "PGD", "order held", "order searched"], rows))
    write_record(asked.json, "sorted_patches", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
