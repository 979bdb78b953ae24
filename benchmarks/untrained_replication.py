"""Replication where nothing is trained in the device: the hardened base itself, with attractors of each device's key.

What ``keyfoundry study replication`` asks of trained devices: HopSkipJump finds images by the answers of some devices,
and they are tried on others. All devices are one network here, so that only attractors keep them apart. Run::

    python -m benchmarks.untrained_replication --data-root ../shared/data/fashion-mnist --json FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.rounds import table, write_record
from device_tests.attacks.hop_skip_jump import HopSkipJump
from device_tests.crafting import craft
from device_tests.fleet_statistics import fleet_rate
from device_tests.images import LEVELS
from device_tests.perturbation import Perturbation
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from factory.attractors import Attracted
from factory.base import load_base, read_base
from factory.data import load_splits
from factory.device_model import block_size, public_model
from factory.folding import bake
from factory.progress import Progress
from factory.recipes.attractors import AttractorsPart
from factory.recipes.recipe import RecipeSettings
from factory.settings import BaseSettings, DataSettings
from factory.studies.workbench import right
from keys.derive import fixed_guess

FARTHEST = Perturbation.parse("l2:10")


def main(arguments: list[str] | None = None) -> int:
    """Ask, try, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--data-root", type=Path, help="all of Fashion-MNIST as IDX files; default: the shipped sample")
    made.add_argument("--images", type=int, default=200, help="test images, shared out among the asked devices")
    made.add_argument("--asked", type=int, default=4, help="devices whose answers are asked for")
    made.add_argument("--targets", type=int, default=6, help="devices on which the images are tried; 2 or more")
    made.add_argument("--queries", type=int, default=1000, help="labels that are asked for an image")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    progress, known = Progress(), read_base(BaseSettings(name="hardened"))
    data = DataSettings() if asked.data_root is None else DataSettings(name="idx", root=asked.data_root)
    with tempfile.TemporaryDirectory() as folder:
        splits = load_splits(data, known.architecture.contract, Path(folder), progress)
    base = load_base(BaseSettings(name="hardened"), splits.labels, asked.seed)
    recipe = RecipeSettings(attractors=AttractorsPart())
    network, shape = bake(public_model(base, recipe)), base.architecture.contract.shape

    def device(number: int) -> Attracted:
        key = fixed_guess(f"untrained-{number}")
        attractors = AttractorsPart().build(key, shape, block_size(base, recipe), len(splits.labels))
        return Attracted(network, attractors).eval()

    test = splits.test.take(asked.images)
    images, truth = test.images.numpy(), test.labels.numpy()
    adversarial, found = images.copy(), np.zeros(len(truth), bool)
    attack = HopSkipJump(norm=FARTHEST.norm, queries=asked.queries, smallest=True)
    for number, share in enumerate(np.array_split(np.arange(len(truth)), asked.asked)):
        model = device(number)
        source = Source(f"untrained-{number}", Threat.QUERIES, model, "its answers", differentiable=False)
        with progress.stage(f"ask device {number}", total=len(share) * asked.queries, unit="queries") as stage:
            answer = craft(
                source, [attack], images[share], truth[share], perturbation=FARTHEST, seed=asked.seed,
                progress=stage.advance,
            )  # fmt: skip
        adversarial[share] = answer.images[attack.name]
        found[share] = right(model, images[share], truth[share]) & ~right(model, adversarial[share], truth[share])
    targets = [device(number) for number in range(asked.asked, asked.asked + asked.targets)]
    judged = np.array([right(target, images, truth) & found for target in targets])
    fooled = np.array([~right(target, adversarial, truth) for target in targets])
    rate = fleet_rate(fooled, judged)
    moved = (adversarial[found].astype(np.float64) - images[found]).reshape(int(found.sum()), -1) / LEVELS
    distance = float(np.median(np.linalg.norm(moved, axis=1)))
    if isinstance(rate, NotMeasured):
        sys.stderr.write(f"Not measured: {rate.reason}.\n")
        return 1
    row = [f"{int(found.sum())}", f"L2 {distance:.2f}", f"{rate.mean:.4f} [{rate.low:.4f}, {rate.high:.4f}]"]
    sys.stdout.write(table(["found", "median distance", "replicates on another device"], [row]) + "\n")
    values = {"found": int(found.sum()), "median_distance": distance, "replicates": rate.to_json()}
    write_record(asked.json, "untrained_replication", asked, values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
