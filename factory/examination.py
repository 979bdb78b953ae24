"""What is measured on a candidate beside the rule: queries (T4), its formats under attack, canaries.

None of it decides about a release. A failed canary says that figures of this model look better than they are, and the
report marks them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from device_tests.attacks.square import Square
from device_tests.canaries import Canaries, canary_cost, run_canaries
from device_tests.crafting import content_key
from device_tests.package_judgement import PackageJudgement, judge_package
from device_tests.threats import Threat
from device_tests.transfer import TargetJudgement, judge
from exporters.measured import NotMeasured
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from factory.packaging import ONNX_NAME, open_formats
from factory.progress import Progress
from factory.queries import asked_target, bypass_source, query_attacks
from factory.settings import VerificationSettings
from factory.verification import Attacked, AttackedSource, attack_source, attacks_of, strong_budget
from keys.files import sha256_file, write_atomic


@dataclass(frozen=True, eq=False)
class Queried:
    """What attacks by answers did to one target, and what they were made on."""

    judgement: TargetJudgement
    sources: tuple[AttackedSource, ...]


@dataclass(frozen=True, eq=False)
class Examination:
    """``queries``, ``canaries``: None where the budget has none. ``formats``: every format beside torch."""

    queries: Queried | None
    formats: PackageJudgement | NotMeasured
    canaries: Canaries | None


@dataclass(frozen=True, eq=False)
class Examined:
    """The candidate: its id, its baked torch model and its package."""

    name: str
    baked: nn.Module
    package: Path


def query(
    examined: Examined,
    base: nn.Module,
    attackers_images: np.ndarray,
    on: Attacked,
    settings: VerificationSettings,
    *,
    block_size: int,
    seed: int,
    progress: Progress,
) -> Queried | None:
    """Attack the exported package by its answers alone; None where the budget has no queries.

    ``attackers_images``: uint8, the attacker's own: training images, of which the first ``bypass_queries`` are asked
    about.
    """
    if not settings.query_images:
        return None
    runtime, digest = OnnxRuntime(examined.package / ONNX_NAME), sha256_file(examined.package / ONNX_NAME)
    count = min(settings.query_images, len(on.images))
    few = Attacked(on.images[:count], on.labels[:count], on.cache)
    sources = [(asked_target(examined.name, runtime, digest), query_attacks(settings))]
    if settings.bypass_queries:
        stand_in = bypass_source(
            examined.name, base, runtime, attackers_images[: settings.bypass_queries], digest=digest,
            block_size=block_size, seed=seed, cache=on.cache, progress=progress,
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
    return Queried(judge(runtime, examined.name, few.images, few.labels, sets, [], required=()), tuple(made))


def formats_under_attack(
    examined: Examined, sources: Sequence[AttackedSource], on: Attacked, settings: VerificationSettings
) -> PackageJudgement | NotMeasured:
    """The attacks made on the public base, through torch, onnxruntime and Core ML: the same bytes to each."""
    base = next((one for one in sources if one.source.threat is Threat.PUBLIC_BASE), None)
    if base is None or not base.adversarial.images:
        return NotMeasured("no attack on the public base was run")
    runtimes: Mapping[str, Runtime] = open_formats(examined.package)
    few = {name: settings.coreml_images for name in runtimes if name.startswith("Core ML")}
    return judge_package(
        TorchRuntime(examined.baked), runtimes, on.images, on.labels, base.adversarial.images, first=few
    )


def canaries_of(
    examined: Examined, sources: Sequence[AttackedSource], on: Attacked, settings: VerificationSettings, *, seed: int,
    progress: Progress,
) -> Canaries | None:  # fmt: skip
    """Look for gradient masking in the candidate; None where the budget has no canaries."""
    if not settings.canaries:
        return None
    count = min(settings.self_check_images, len(on.images))
    images, labels = on.images[:count], on.labels[:count]
    others = {
        f"{one.source.id}, {attack}": attacked[:count]
        for one in sources
        if one.source.threat.in_rule and one.source.id != examined.name
        for attack, attacked in one.adversarial.images.items()
    }
    square, strong = Square(queries=settings.queries), strong_budget(settings)
    budget = (square.description, strong, seed, settings.epsilon, *sorted(others))
    key = content_key(examined.baked, np.concatenate([images, *others.values()]), labels, "canaries", *budget)
    path = on.cache / examined.name / "canaries.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one: run them
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return Canaries.from_json(stored["canaries"])
    work = count * canary_cost(strong, square)
    with progress.stage(f"canaries {examined.name} (at most)", total=work, unit="gradients") as stage:
        found = run_canaries(
            examined.baked, images, labels, epsilon=settings.epsilon, seed=seed, black_box=others, square=square,
            source=examined.name, strong=strong, progress=stage.advance,
        )  # fmt: skip
    write_atomic(path, json.dumps({"key": key, "canaries": found.to_json()}).encode())
    return found
