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
from device_tests.attacks.catalogue import named_attacks, suited
from device_tests.crafting import AdversarialSet, cached_images, content_key, craft
from device_tests.evidence import Measured, Proportion, SelfCheck, measured_from_json
from device_tests.perturbation import Perturbation
from device_tests.self_check import (
    UNBOUNDED,
    StrongBudget,
    StrongResult,
    fooled_without_bound,
    run_strong,
    self_check,
    strong_key,
)
from device_tests.threats import Source
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from factory.progress import Progress
from factory.record import kept
from factory.settings import VerificationSettings
from factory.train import uses_bf16

UNBOUNDED_IMAGES = 32
LEAST_UNBOUNDED = 0.9
"""Share of the images that PGD must fool on a source when nothing bounds the change."""


@dataclass(frozen=True, eq=False)
class AttackedSource:
    """One source with the images that its attacks made, and whether those attacks are to be believed.

    ``clean``: how many of the attacked images the source itself gets right. ``unbounded``: how many of them PGD fools
    with no bound on the change.
    """

    source: Source
    clean: Measured
    adversarial: AdversarialSet
    checks: tuple[SelfCheck, ...]
    unbounded: Measured


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
    """Craft all attacks on ``source``, and check them against a strong attack on it (not where they are queries).

    An attack that needs what the source's network does not have is left out, and that is said.
    """
    attacks, left_out = suited(attacks, source.model, source.id)
    for sentence in left_out:
        progress.say(sentence)
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
    if not adversarial.needs_self_check:
        none = NotMeasured("no strong attack has to vouch for these")
        return AttackedSource(source, none, adversarial, (), none)
    strong = strong_on(source, on, perturbation=perturbation, budget=budget, seed=seed, progress=progress)
    checks = self_check(source, adversarial, on.labels, strong, margin)
    clean = accuracy(TorchRuntime(source.model), on.images, on.labels)
    return AttackedSource(source, clean, adversarial, checks, unbounded_on(source, on, seed=seed, progress=progress))


def gradients_left(
    source: Source, attacks: Sequence[Attack], on: Attacked, *, perturbation: Perturbation, seed: int
) -> int:
    """Gradients that the attacks still need, at most: those of images that are not in the cache."""
    left = 0
    for attack in suited(attacks, source.model, source.id)[0]:
        done = cached_images(
            source, attack, on.images, on.labels, perturbation=perturbation, seed=seed, cache=on.cache / source.id
        )
        left += (len(on.images) - done) * attack.gradients_per_image
    return left


def strong_on(
    source: Source, on: Attacked, *, perturbation: Perturbation, budget: StrongBudget, seed: int, progress: Progress
) -> StrongResult:
    """What the strong attack does to ``source``; from the cache where nothing that it depends on has changed."""
    key = strong_key(source, on.images, on.labels, perturbation=perturbation, budget=budget, seed=seed)
    # The key in the name: a test with more images and one with fewer take turns, and neither undoes the other's work.
    path = on.cache / source.id / f"self-check-{key[:12]}.json"

    def attack() -> StrongResult:
        work = budget.images * (budget.steps + 1) * (1 + budget.targets)
        with progress.stage(f"self-check {source.id} (at most)", total=work, unit="gradients") as stage:
            return run_strong(
                source, on.images, on.labels, perturbation=perturbation, budget=budget, seed=seed,
                progress=stage.advance,
            )  # fmt: skip

    return kept(path, key, compute=attack, to_json=StrongResult.to_json, from_json=StrongResult.from_json)


def unbounded_on(source: Source, on: Attacked, *, seed: int, progress: Progress) -> Measured:
    """How many of the first images PGD fools with no bound on the change; from the cache where nothing has changed."""
    images, labels = on.images[:UNBOUNDED_IMAGES], on.labels[:UNBOUNDED_IMAGES]
    key = content_key(source.model, images, labels, "unbounded", UNBOUNDED.description, seed)

    def attack() -> Measured:
        work = len(images) * UNBOUNDED.gradients_per_image
        with progress.stage(f"unbounded {source.id}", total=work, unit="gradients") as stage:
            return fooled_without_bound(source.model, images, labels, seed=seed, progress=stage.advance)

    path = on.cache / source.id / "unbounded.json"
    return kept(path, key, compute=attack, to_json=lambda value: value.to_json(), from_json=measured_from_json)


def weak_sources(attacked: Sequence[AttackedSource], target: Proportion) -> dict[str, str]:
    """Sources that make their threat look harmless, with the reason not to believe them.

    The self-check looks only at images that a source gets right, so a source that hardly classifies (less than half
    as many as the target) would pass it. So would one whose gradients mislead every attack, weak and strong: with no
    bound on the change, PGD fools any model whose gradients mean something.
    """
    weak: dict[str, str] = {}
    for one in attacked:
        clean, free = one.clean, one.unbounded
        if isinstance(clean, Proportion) and clean.value < 0.5 * target.value:
            weak[one.source.id] = (
                f"the source {one.source.id} classifies only {clean.value:.3f} of {clean.n} clean images"
            )
        elif isinstance(free, Proportion) and free.value < LEAST_UNBOUNDED:
            weak[one.source.id] = (
                f"the gradients of {one.source.id} mislead: with no bound on the change, PGD fools only "
                f"{free.value:.3f} of {free.n} images"
            )
    return weak


def self_checks(attacked: Sequence[AttackedSource]) -> list[SelfCheck]:
    """All self-checks in one list."""
    return [check for one in attacked for check in one.checks]
