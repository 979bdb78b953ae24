"""What is measured on a candidate beside the rule: queries (T4), its formats under attack, canaries.

None of it decides about a release. A failed canary says that figures of this model look better than they are, and the
report marks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from device_tests.accuracy import accuracy
from device_tests.attacks.square import Square
from device_tests.canaries import Canaries, canary_cost, run_canaries
from device_tests.crafting import content_key
from device_tests.package_judgement import PackageJudgement, judge_package
from device_tests.threats import Threat
from device_tests.transfer import judge
from exporters.measured import NotMeasured
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from factory.device_model import block_size
from factory.fleet import Candidate, Examination, Fleet, Queried
from factory.packaging import ONNX_NAME, open_formats
from factory.queries import asked_target, bypass_source, query_attacks
from factory.record import kept
from factory.verification import (
    Attacked,
    AttackedSource,
    attack_source,
    attacks_of,
    self_checks,
    strong_budget,
    weak_sources,
)
from keys.files import sha256_file


def examine(
    fleet: Fleet, candidate: Candidate, base: nn.Module, sources: Sequence[AttackedSource], on: Attacked
) -> Examination:
    """Measure all that the budget has. ``base``: the public base; ``sources``: those judged on the candidate."""
    return Examination(
        query(fleet, candidate, base, on),
        formats_under_attack(fleet, candidate, sources, on),
        canaries_of(fleet, candidate, sources, on),
    )


def query(fleet: Fleet, candidate: Candidate, base: nn.Module, on: Attacked) -> Queried | None:
    """Attack the exported package by its answers alone; None where the budget has no queries.

    A stand-in for the keyed stage is fitted to answers about the attacker's own images: training images.
    """
    settings, seed, progress = fleet.settings.verification, fleet.settings.seed, fleet.progress
    if not settings.query_images:
        return None
    path = candidate.package / ONNX_NAME
    runtime, digest = OnnxRuntime(path), sha256_file(path)
    count = min(settings.query_images, len(on.images))
    few = Attacked(on.images[:count], on.labels[:count], on.cache)
    sources = [(asked_target(candidate.name, runtime, digest), query_attacks(settings))]
    if settings.bypass_queries:
        stand_in = bypass_source(
            candidate.name, base, runtime, fleet.splits.train.take(settings.bypass_queries).images.numpy(),
            digest=digest, block_size=block_size(fleet.base, fleet.settings.recipe), seed=seed, cache=on.cache,
            progress=progress,
        )  # fmt: skip
        sources.append((stand_in, attacks_of(settings)))
    made = [
        attack_source(
            source, attacks, few, perturbation=settings.perturbation, budget=strong_budget(settings),
            margin=settings.self_check_margin, seed=seed, progress=progress,
        )
        for source, attacks in sources
    ]  # fmt: skip
    sets = [one.adversarial for one in made]
    weak = weak_sources(made, accuracy(runtime, few.images, few.labels))
    judgement = judge(
        runtime, candidate.name, few.images, few.labels, sets, self_checks(made), required=(), weak=weak
    )  # fmt: skip
    return Queried(judgement, tuple(made))


def formats_under_attack(
    fleet: Fleet, candidate: Candidate, sources: Sequence[AttackedSource], on: Attacked
) -> PackageJudgement | NotMeasured:
    """The attacks made on the public base, through torch, onnxruntime and Core ML: the same bytes to each."""
    base = next((one for one in sources if one.source.threat is Threat.PUBLIC_BASE), None)
    if base is None or not base.adversarial.images:
        return NotMeasured("no attack on the public base was run")
    runtimes: Mapping[str, Runtime] = open_formats(candidate.package)
    few = {name: fleet.settings.verification.coreml_images for name in runtimes if name.startswith("Core ML")}
    return judge_package(
        TorchRuntime(candidate.baked), runtimes, on.images, on.labels, base.adversarial.images, first=few
    )


def canaries_of(fleet: Fleet, candidate: Candidate, sources: Sequence[AttackedSource], on: Attacked) -> Canaries | None:
    """Look for gradient masking in the candidate, as who holds it attacks it; None where the budget has no canaries."""
    settings, seed = fleet.settings.verification, fleet.settings.seed
    if not settings.canaries:
        return None
    count = min(settings.self_check_images, len(on.images))
    images, labels = on.images[:count], on.labels[:count]
    others = {
        f"{one.source.id}, {attack}": attacked[:count]
        for one in sources
        if one.source.threat.in_rule and one.source.id != candidate.name
        for attack, attacked in one.adversarial.images.items()
    }
    square, strong = Square(queries=settings.queries), strong_budget(settings)
    budget = (square.description, strong, seed, settings.epsilon, *sorted(others))
    key = content_key(candidate.baked, np.concatenate([images, *others.values()]), labels, "canaries", *budget)
    path = on.cache / candidate.name / "canaries.json"

    def run() -> Canaries:
        work = count * canary_cost(strong, square)
        with fleet.progress.stage(f"canaries {candidate.name} (at most)", total=work, unit="gradients") as stage:
            return run_canaries(
                candidate.baked, images, labels, epsilon=settings.epsilon, seed=seed, black_box=others, square=square,
                source=candidate.name, strong=strong, progress=stage.advance,
            )  # fmt: skip

    return kept(path, key, compute=run, to_json=Canaries.to_json, from_json=Canaries.from_json)
