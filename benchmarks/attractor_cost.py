"""What attractors cost a device: noise, patterns made without its key, guessed keys, and attacks on the device itself.

Models are the hardened base with the attractors of public keys, and nothing is trained: what attractors add does not
depend on the adapter. Every figure has the same one without attractors beside it, on the same images. *Patterns* are
random signs of the frequencies that carriers are made of: no key, no model, no gradient; an image is fooled by them if
one of ``--patterns`` is. Run::

    python -m benchmarks.attractor_cost --json FILE
    python -m benchmarks.attractor_cost --reach 0.35 --gain 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rounds import table, write_record
from device_tests.attacks.pgd import PGD
from device_tests.ensemble import Ensemble
from device_tests.fleet_statistics import fleet_rate
from device_tests.images import LEVELS
from factory.attractors import Attracted
from factory.base import load_base, read_base
from factory.data import Split, load_splits
from factory.device_model import block_size, public_model
from factory.folding import bake
from factory.keyless_patterns import TRIES, draw_patterns
from factory.progress import Progress
from factory.recipes.attractors import AttractorsPart
from factory.recipes.recipe import RecipeSettings
from factory.settings import BaseSettings, DataSettings
from factory.studies.workbench import right
from keys.derive import fixed_guess

NOISE = (0.05, 0.1, 0.2)
BALLS = (4, 8, 16)
DEVICES, GUESSES = 6, 8


def measured(
    part: AttractorsPart, test: Split, names: tuple[str, ...], count: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """One row per case: fooling rates of devices with attractors and of the same model without, with intervals.

    Of noise: the share of all images that get a wrong answer.
    """
    base = load_base(BaseSettings(name="hardened"), names, seed)
    recipe, shape = RecipeSettings(attractors=part), base.architecture.contract.shape
    block, classes = block_size(base, recipe), len(names)
    network = bake(public_model(base, RecipeSettings()))

    def attracted(name: str) -> nn.Module:
        return Attracted(network, part.build(fixed_guess(name), shape, block, classes)).eval()

    devices = [attracted(f"device-{number}") for number in range(1, DEVICES + 1)]
    guesses = [part.build(fixed_guess(f"guess-{number}"), shape, block, classes) for number in range(1, GUESSES + 1)]
    pixels, labels = test.images.numpy(), test.labels.numpy()
    images, truth = test.images.float() / LEVELS, test.labels
    clean = {model: right(model, pixels, labels) for model in (network, *devices)}
    aimless = draw_patterns(shape, block, count, seed)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []

    def row(case: str, sets: Callable[[nn.Module], Sequence[Tensor]], *, of_right: bool = True) -> None:
        def fooled(model: nn.Module) -> np.ndarray:
            return np.any(
                [~right(model, np.round(moved.numpy() * LEVELS).astype(np.uint8), labels) for moved in sets(model)],
                axis=0,
            )

        hits = np.array([fooled(device) for device in devices])
        mask = np.array([clean[device] if of_right else np.ones_like(clean[device]) for device in devices])
        alone = fooled(network)[clean[network] if of_right else slice(None)]
        rows.append({"case": case, "attractors": fleet_rate(hits, mask).to_json(), "without": float(alone.mean())})
        progress.say(case)

    row("clean images, wrong answers", lambda model: [images], of_right=False)
    for sigma in NOISE:
        noisy = (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        row(f"Gaussian noise, σ = {sigma:g}, wrong answers", lambda model, noisy=noisy: [noisy], of_right=False)
    for level in BALLS:
        epsilon = level / LEVELS

        def attack(model: nn.Module, epsilon: float = epsilon) -> Tensor:
            return PGD(steps=20).generate(model, images, truth, epsilon=epsilon, seed=seed)

        alone, guessed, together = (
            attack(network),
            attack(Attracted(network, guesses[0])),
            attack(Attracted(network, Ensemble(guesses))),
        )
        shown = [(images + epsilon * pattern).clamp(0, 1) for pattern in aimless]
        row(f"{level}/255, {count} patterns without a key", lambda model, shown=shown: shown)
        row(f"{level}/255, PGD on the model without attractors", lambda model, moved=alone: [moved])
        row(f"{level}/255, PGD on a guessed key", lambda model, moved=guessed: [moved])
        row(f"{level}/255, PGD on {GUESSES} guessed keys at once", lambda model, moved=together: [moved])
        row(
            f"{level}/255, worst of these",
            lambda model, shown=shown, more=(alone, guessed, together): [*shown, *more],
        )
        row(f"{level}/255, PGD on the device itself", lambda model, attack=attack: [attack(model)])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = AttractorsPart()
    parser.add_argument("--count", type=int, default=defaults.count, help="attractors of a device")
    parser.add_argument("--reach", type=float, default=defaults.reach, help="L2 at which one adds its gain")
    parser.add_argument("--gain", type=float, default=defaults.gain)
    parser.add_argument("--images", type=int, default=300, help="of the shipped sample's test images")
    parser.add_argument("--patterns", type=int, default=TRIES, help="tries of patterns made without a key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = parser.parse_args(arguments)
    part = AttractorsPart(count=asked.count, reach=asked.reach, gain=asked.gain)
    progress = Progress()
    contract = read_base(BaseSettings(name="hardened")).architecture.contract
    splits = load_splits(DataSettings(), contract, Path(), progress)
    rows = measured(part, splits.test.take(asked.images), splits.labels, asked.patterns, asked.seed, progress)
    cells = [
        [row["case"], f"{row['attractors']['mean']:.3f} {_interval(row)}", f"{row['without']:.3f}"] for row in rows
    ]
    sys.stdout.write(table(["case", f"with attractors, {DEVICES} keys", "without"], cells) + "\n")
    write_record(asked.json, "attractor_cost", asked, {"rows": rows})
    return 0


def _interval(row: dict[str, Any]) -> str:
    return "[{:.3f}, {:.3f}]".format(*row["attractors"]["interval"])


if __name__ == "__main__":
    sys.exit(main())
