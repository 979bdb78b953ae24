"""The nouns that the pipeline passes from step to step; each is frozen and made by exactly one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from device_tests.canaries import Canaries
from device_tests.evidence import Proportion
from device_tests.package_judgement import PackageJudgement
from device_tests.release_rule import Decision
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from exporters.parity import Parity
from factory.base import Base
from factory.data import Splits
from factory.device_model import DeviceModel
from factory.fleet_folder import FleetFolder
from factory.progress import Progress
from factory.settings import FleetSettings
from factory.verification import AttackedSource
from keys.vault import Vault


@dataclass(frozen=True)
class Fleet:
    """An open fleet: its folder, settings, secrets, base and data."""

    folder: FleetFolder
    settings: FleetSettings
    vault: Vault
    base: Base
    splits: Splits
    progress: Progress


@dataclass(frozen=True)
class Candidate:
    """A trained model with its unsigned package: a device of the fleet, or the un-keyed control."""

    name: str
    generation: int
    model: DeviceModel
    baked: nn.Module
    package: Path


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
class Quantised:
    """What a quantised format answers: clean accuracy beside the base's on the same images, and under attack."""

    base_clean: Proportion
    clean: Proportion
    judgement: TargetJudgement


@dataclass(frozen=True)
class Verdict:
    """Everything measured about one candidate, and what was decided. ``quantised``: by the format's title."""

    candidate: Candidate
    clean: Proportion
    parity: dict[str, Parity | NotMeasured]
    judgement: TargetJudgement
    quantised: Mapping[str, Quantised]
    examination: Examination
    decision: Decision


@dataclass(frozen=True)
class Findings:
    """The result of one run over a fleet: what the report is written from."""

    fleet: Fleet
    base_clean: Proportion
    sources: tuple[AttackedSource, ...]
    verdicts: tuple[Verdict, ...]
    controls: tuple[Verdict, ...]
    seconds: dict[str, float]
