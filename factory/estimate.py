"""How long the attacks will take on this machine: work that is not cached yet, and a rate measured now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from device_tests.attacks.attack import Attack
from device_tests.attacks.gradients import at_rest, loss_gradient
from device_tests.ensemble import members_of
from device_tests.images import from_8bit
from device_tests.perturbation import Perturbation
from device_tests.self_check import UNBOUNDED, StrongBudget
from device_tests.threats import Source
from factory.verification import UNBOUNDED_IMAGES, Attacked, gradients_left

_SAMPLE = 64
"""Images of the gradient that is timed."""


@dataclass(frozen=True)
class Estimate:
    """``gradients``: one model's gradients for one image, at most; ``per_second``: as measured on the first source."""

    sources: int
    gradients: int
    per_second: float

    @property
    def seconds(self) -> float:
        """Upper estimate: attacks that end early need less."""
        return self.gradients / self.per_second

    @property
    def sentence(self) -> str:
        """One line for the operator."""
        if not self.gradients:
            return f"All attacks on {self.sources} sources are there already."
        minutes = self.seconds / 60
        words = f"{minutes:.0f} min" if minutes >= 1 else f"{self.seconds:.0f} s"
        return (
            f"Attacks on {self.sources} sources: at most {self.gradients:,} gradients, about {words} at "
            f"{self.per_second:.0f} a second (measured now)."
        )


def estimate(
    sources: Sequence[Source], attacks: Sequence[Attack], on: Attacked, *, perturbation: Perturbation,
    budget: StrongBudget, seed: int,
) -> Estimate:  # fmt: skip
    """What is left to attack, and how long it will take; self-checks count in full for sources that are not cached."""
    total = 0
    for source in sources:
        size = sum(1 for _ in members_of(source.model))
        left = gradients_left(source, attacks, on, perturbation=perturbation, seed=seed)
        if left:
            left += min(budget.images, len(on.images)) * (budget.steps + 1) * (1 + budget.targets)
            left += min(UNBOUNDED_IMAGES, len(on.images)) * UNBOUNDED.gradients_per_image
        total += left * size
    return Estimate(len(sources), total, _rate(sources[0], on))


def _rate(source: Source, on: Attacked) -> float:
    images = torch.from_numpy(from_8bit(on.images[:_SAMPLE]))
    labels = torch.from_numpy(on.labels[:_SAMPLE])
    with at_rest(source.model):
        loss_gradient(source.model, images, labels)  # the first one is slow
        started = time.perf_counter()
        loss_gradient(source.model, images, labels)
    return len(images) / max(time.perf_counter() - started, 1e-9)
