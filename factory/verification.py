"""Attack every source once, so that every candidate can be judged against all of them.

What is expensive (attacks and their self-checks) is cached under the content that it depends on: a second run, or one
more device, attacks only what is new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from device_tests.accuracy import accuracy
from device_tests.attacks.attack import Attack
from device_tests.attacks.catalogue import named_attacks
from device_tests.crafting import AdversarialSet, cached_images, craft
from device_tests.evidence import Measured, Proportion, SelfCheck
from device_tests.perturbation import Perturbation
from device_tests.self_check import StrongBudget, StrongResult, run_strong, self_check, strong_key
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from factory.progress import Progress
from factory.record import kept
from factory.settings import VerificationSettings
from factory.train import uses_bf16


@dataclass(frozen=True, eq=False)
class AttackedSource:
    """One source with the images that its attacks made, and whether those attacks are to be believed.

    ``clean``: how many of the attacked images the source itself gets right.
    """

    source: Source
    clean: Measured
    adversarial: AdversarialSet
    checks: tuple[SelfCheck, ...]


@dataclass(frozen=True, eq=False)
class Attacked:
    """The images that are attacked: uint8 N×C×H×W, labels int64 N, and where attacks on them are kept."""

    images: np.ndarray
    labels: np.ndarray
    cache: Path


def attacks_of(settings: VerificationSettings) -> tuple[Attack, ...]:
    """The attacks that are run on every source that gives gradients."""
    bf16 = uses_bf16(settings.precision, torch.device("cpu"))
    return named_attacks(
        settings.attacks, pgd_steps=settings.pgd_steps, momentum_steps=settings.momentum_steps, bf16=bf16
    )


def strong_budget(settings: VerificationSettings) -> StrongBudget:
    """What the self-check runs on every source."""
    return StrongBudget(
        steps=settings.self_check_steps, targets=settings.self_check_targets, images=settings.self_check_images
    )


def attack_source(
    source: Source,
    attacks: Sequence[Attack],
    on: Attacked,
    *,
    perturbation: Perturbation,
    budget: StrongBudget,
    margin: float,
    seed: int,
    progress: Progress,
) -> AttackedSource:
    """Craft all attacks on ``source``, and check them against a strong attack on it (not where they are queries)."""
    work = len(on.images) * sum(attack.gradients_per_image for attack in attacks)
    left = gradients_left(source, attacks, on, perturbation=perturbation, seed=seed)
    with contextlib.ExitStack() as stages:
        stage = None
        if left:
            stage = stages.enter_context(progress.stage(f"attack {source.id}", total=work, unit="gradients"))
        adversarial = craft(
            source, attacks, on.images, on.labels, perturbation=perturbation, seed=seed, cache=on.cache / source.id,
            progress=None if stage is None else stage.advance,
        )  # fmt: skip
    if source.threat is Threat.QUERIES or not source.differentiable:
        return AttackedSource(source, NotMeasured("the target's own answers are attacked"), adversarial, ())
    strong = strong_on(source, on, perturbation=perturbation, budget=budget, seed=seed, progress=progress)
    checks = self_check(source, adversarial, on.labels, strong, margin)
    return AttackedSource(source, accuracy(TorchRuntime(source.model), on.images, on.labels), adversarial, checks)


def gradients_left(
    source: Source, attacks: Sequence[Attack], on: Attacked, *, perturbation: Perturbation, seed: int
) -> int:
    """Gradients that the attacks still need, at most: those of images that are not in the cache."""
    left = 0
    for attack in attacks:
        done = cached_images(
            source, attack, on.images, on.labels, perturbation=perturbation, seed=seed, cache=on.cache / source.id
        )
        left += (len(on.images) - done) * attack.gradients_per_image
    return left


def strong_on(
    source: Source, on: Attacked, *, perturbation: Perturbation, budget: StrongBudget, seed: int, progress: Progress
) -> StrongResult:
    """What the strong attack does to ``source``; from the cache where nothing that it depends on has changed."""
    path = on.cache / source.id / f"self-check-{perturbation.code.replace(':', '-')}.json"
    key = strong_key(source, on.images, on.labels, perturbation=perturbation, budget=budget, seed=seed)

    def attack() -> StrongResult:
        work = budget.images * (budget.steps + 1) * (1 + budget.targets)
        with progress.stage(f"self-check {source.id} (at most)", total=work, unit="gradients") as stage:
            return run_strong(
                source, on.images, on.labels, perturbation=perturbation, budget=budget, seed=seed,
                progress=stage.advance,
            )  # fmt: skip

    return kept(path, key, compute=attack, to_json=StrongResult.to_json, from_json=StrongResult.from_json)


def weak_sources(attacked: Sequence[AttackedSource], target: Proportion) -> dict[str, str]:
    """Sources that classify less than half as many images as the target, with the reason not to believe them.

    The self-check looks only at images that a source gets right, so a source that hardly classifies would pass it
    and make its threat look harmless.
    """
    return {
        one.source.id: f"the source {one.source.id} classifies only {one.clean.value:.3f} of {one.clean.n} clean images"
        for one in attacked
        if isinstance(one.clean, Proportion) and one.clean.value < 0.5 * target.value
    }


def self_checks(attacked: Sequence[AttackedSource]) -> list[SelfCheck]:
    """All self-checks in one list."""
    return [check for one in attacked for check in one.checks]
