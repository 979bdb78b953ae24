"""How often the intervals of ``device_tests/fleet_statistics.py`` hold the truth, by simulation.

A nominal 95 % interval is good if it covers 93 to 97 %. The model: a device fools on an image with log-odds
μ + device + image, device ~ N(0, s²), image ~ N(0, v²); images that are hard to classify are easier to fool, and
every device judges its own images, about nine in ten. Run::

    python -m benchmarks.coverage --replications 2000
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit

from device_tests.fleet_statistics import FleetDifference, FleetRate, arm_difference, fleet_rate, group_difference
from exporters.measured import NotMeasured

RATES = (0.02, 0.05, 0.2, 0.5, 0.7)
DEVICE_SPREADS = (0.0, 0.15, 0.4)
UNEVEN = 0.8
IMAGE_SPREADS = (0.0, 2.0)
CLEAN = 2.5
HARDNESS = 0.8

STUDIES = ((3, 128), (8, 128), (10, 128), (10, 256))
"""Devices and images of the recorded studies, beside the sizes that a reader may choose."""

NODES, _AREAS = hermegauss(41)
WEIGHTS = _AREAS / _AREAS.sum()


@dataclass(frozen=True)
class Population:
    """Devices and images to sample from. ``rate``: the true mean rate; ``device``, ``image``: standard deviations."""

    rate: float
    device: float
    image: float

    def level(self) -> float:
        """μ for which the mean over devices of the rate on judged images is ``rate``."""
        right = expit(CLEAN - HARDNESS * NODES)

        def excess(level: float) -> float:
            odds = level + self.device * NODES[:, None] + self.image * NODES[None]
            rates = (expit(odds) * right * WEIGHTS).sum(axis=1) / (right * WEIGHTS).sum()
            return float((WEIGHTS * rates).sum()) - self.rate

        low, high = -40.0, 40.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) > 0 else (middle, high)
        return low

    def fooled(
        self, rng: np.random.Generator, level: float, devices: np.ndarray, hardness: np.ndarray, judged: np.ndarray
    ) -> np.ndarray:
        """Outcomes, bool D×N, for ``devices`` (standard normal, D) and images of ``hardness`` (standard normal, N)."""
        odds = level + self.device * devices[:, None] + self.image * hardness
        return (rng.random(judged.shape, dtype=np.float32) < expit(odds.astype(np.float32))) & judged


def draw_judged(rng: np.random.Generator, devices: int, hardness: np.ndarray) -> np.ndarray:
    """Which images each device gets right when clean, bool D×N."""
    return rng.random((devices, len(hardness)), dtype=np.float32) < expit(CLEAN - HARDNESS * hardness)


@dataclass(frozen=True)
class Coverage:
    """How often intervals lay below, around and above the truth, and how wide they were."""

    below: float
    above: float
    width: float

    @property
    def covered(self) -> float:
        """Share of the intervals that hold the truth."""
        return 1 - self.below - self.above


def repeat(interval: Callable[[], tuple[float, float]], truth: float, replications: int) -> Coverage:
    """Coverage of ``interval``, called ``replications`` times."""
    ends = np.array([interval() for _ in range(replications)])
    below, above = (ends[:, 1] < truth).mean(), (ends[:, 0] > truth).mean()
    return Coverage(float(below), float(above), float((ends[:, 1] - ends[:, 0]).mean()))


def rate_coverage(
    population: Population, devices: int, images: int, *, replications: int, rng: np.random.Generator
) -> Coverage:
    """Coverage of :func:`fleet_rate`."""
    level = population.level()

    def interval() -> tuple[float, float]:
        hardness = rng.standard_normal(images)
        judged = draw_judged(rng, devices, hardness)
        return ends(fleet_rate(population.fooled(rng, level, rng.standard_normal(devices), hardness, judged), judged))

    return repeat(interval, population.rate, replications)


def bootstrap_coverage(
    population: Population, devices: int, images: int, *, replications: int, rng: np.random.Generator, draws: int = 200
) -> Coverage:
    """Coverage of the plain percentile bootstrap over devices and images, for comparison."""
    level = population.level()

    def interval() -> tuple[float, float]:
        hardness = rng.standard_normal(images)
        judged = draw_judged(rng, devices, hardness)
        fooled = population.fooled(rng, level, rng.standard_normal(devices), hardness, judged)
        weights = rng.multinomial(images, np.full(images, 1 / images), draws).T.astype(np.float64)
        rates = (fooled @ weights) / (judged @ weights)
        means = rates[rng.integers(devices, size=(draws, devices)), np.arange(draws)[:, None]].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    return repeat(interval, population.rate, replications)


def group_coverage(
    first: Population, second: Population, devices: tuple[int, int], images: int, *, replications: int,
    rng: np.random.Generator,
) -> Coverage:  # fmt: skip
    """Coverage of :func:`group_difference`: other devices, the same images."""
    levels = first.level(), second.level()

    def interval() -> tuple[float, float]:
        hardness = rng.standard_normal(images)
        groups: list[np.ndarray] = []
        for population, level, count in zip((first, second), levels, devices, strict=True):
            judged = draw_judged(rng, count, hardness)
            groups += [population.fooled(rng, level, rng.standard_normal(count), hardness, judged), judged]
        return ends(group_difference(*groups))

    return repeat(interval, first.rate - second.rate, replications)


def arm_coverage(
    first: Population, second: Population, devices: int, images: int, *, replications: int, rng: np.random.Generator
) -> Coverage:
    """Coverage of :func:`arm_difference`: the same devices and images; half of a device's variance is the arm's own."""
    levels = first.level(), second.level()

    def interval() -> tuple[float, float]:
        hardness = rng.standard_normal(images)
        judged = draw_judged(rng, devices, hardness)
        shared, own1, own2 = rng.standard_normal((3, devices)) / np.sqrt(2)
        one = first.fooled(rng, levels[0], shared + own1, hardness, judged)
        return ends(arm_difference(one, second.fooled(rng, levels[1], shared + own2, hardness, judged), judged))

    return repeat(interval, first.rate - second.rate, replications)


def ends(estimate: FleetRate | FleetDifference | NotMeasured) -> tuple[float, float]:
    """The interval of an estimate; the populations here always give one."""
    if isinstance(estimate, NotMeasured):
        raise RuntimeError(estimate.reason)
    return estimate.low, estimate.high


def summary(cells: Sequence[Coverage]) -> str:
    """Lowest, mean and highest coverage of some cells, the share within 93–97 %, the tails and the mean width."""
    covered = [100 * cell.covered for cell in cells]
    good = sum(93 <= value <= 97 for value in covered)
    tails = f"{100 * np.mean([cell.below for cell in cells]):.1f} / {100 * np.mean([cell.above for cell in cells]):.1f}"
    return (
        f"{min(covered):.1f} | {np.mean(covered):.1f} | {max(covered):.1f} | {good} of {len(cells)} | {tails} | "
        f"{np.mean([cell.width for cell in cells]):.3f}"
    )


HEADINGS = "lowest | mean | highest | within 93–97 | below / above | mean width |"


def rates_table(replications: int, rng: np.random.Generator) -> Iterator[str]:
    """Mean rate of one fleet: every number of devices and images, over rates and image spreads."""
    yield f"| devices | images | device spread | {HEADINGS}\n|---|---|---|---|---|---|---|---|---|"
    for devices, images in (*itertools.product((2, 3, 5, 10, 12), (300, 400, 1000)), *STUDIES):
        for spread in (*DEVICE_SPREADS, UNEVEN):
            cells = [
                rate_coverage(Population(rate, spread, image), devices, images, replications=replications, rng=rng)
                for rate, image in itertools.product(RATES, IMAGE_SPREADS)
            ]
            yield f"| {devices} | {images} | {spread:g} | {summary(cells)} |"


def bootstrap_table(replications: int, rng: np.random.Generator) -> Iterator[str]:
    """The plain bootstrap beside the corrected interval, 300 images."""
    yield f"| devices | device spread | method | {HEADINGS}\n|---|---|---|---|---|---|---|---|---|"
    for devices, spread in itertools.product((3, 5, 10, 12), (0.0, 0.4)):
        for name, coverage in (("plain bootstrap", bootstrap_coverage), ("corrected", rate_coverage)):
            cells = [
                coverage(Population(rate, spread, 1.0), devices, 300, replications=replications, rng=rng)
                for rate in (0.05, 0.2, 0.5)
            ]
            yield f"| {devices} | {spread:g} | {name} | {summary(cells)} |"


def groups_table(replications: int, rng: np.random.Generator) -> Iterator[str]:
    """Difference of two groups of devices on the same images."""
    yield f"| devices | images | {HEADINGS}\n|---|---|---|---|---|---|---|---|"
    pairs = ((0.02, 0.05), (0.05, 0.05), (0.2, 0.05), (0.5, 0.2), (0.5, 0.5))
    sizes = itertools.product(((2, 2), (3, 3), (5, 5), (10, 3), (10, 10)), (300, 1000))
    for devices, images in (*sizes, *(((devices, 3), images) for devices, images in STUDIES)):
        cells = [
            group_coverage(
                Population(one, spread, image), Population(other, spread, image), devices, images,
                replications=replications, rng=rng,
            )
            for (one, other), spread, image in itertools.product(pairs, DEVICE_SPREADS, (1.0, 3.0))
        ]  # fmt: skip
        yield f"| {devices[0]} and {devices[1]} | {images} | {summary(cells)} |"


def arms_table(replications: int, rng: np.random.Generator) -> Iterator[str]:
    """Difference of two attacks on the same devices and images."""
    yield f"| devices | images | {HEADINGS}\n|---|---|---|---|---|---|---|---|"
    pairs = ((0.02, 0.02), (0.05, 0.05), (0.1, 0.05), (0.25, 0.2), (0.5, 0.5))
    for devices, images in itertools.product((2, 3, 5, 10), (300, 1000)):
        cells = [
            arm_coverage(
                Population(one, spread, image), Population(other, spread, image), devices, images,
                replications=replications, rng=rng,
            )
            for (one, other), spread, image in itertools.product(pairs, DEVICE_SPREADS, (1.0, 3.0))
        ]  # fmt: skip
        yield f"| {devices} | {images} | {summary(cells)} |"


TABLES = {"rates": rates_table, "bootstrap": bootstrap_table, "groups": groups_table, "arms": arms_table}


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Simulated coverage of the fleet intervals.")
    parser.add_argument("--replications", type=int, default=2000, help="simulated fleets in each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", choices=TABLES, action="append", help="only this table; may be given again")
    arguments = parser.parse_args()
    for name in arguments.table or TABLES:
        started = time.monotonic()
        # A stream of its own for each table, so that one table alone gives the same figures.
        rng = np.random.default_rng([arguments.seed, *name.encode()])
        print(f"\n### {name}, {arguments.replications} replications a cell, seed {arguments.seed}\n")
        for line in TABLES[name](arguments.replications, rng):
            print(line, flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
