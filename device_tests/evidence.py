"""The figures a device is judged by, as frozen values that turn into plain JSON and back.

Rules: a proportion never stands without its n and its interval; what was not measured is a
:class:`~exporters.measured.NotMeasured` with its reason. No torch: a device writes receipts with this file.

>>> Proportion(21, 298).value < 0.1
True
>>> Proportion.from_json(Proportion(1, 4).to_json())
Proportion(successes=1, n=4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from device_tests.perturbation import Perturbation
from device_tests.statistics import wilson_interval
from device_tests.threats import Threat
from exporters.measured import NotMeasured
from keys.errors import InputError


@dataclass(frozen=True)
class Proportion:
    """``successes`` out of ``n`` ≥ 1 images; raises ``ValueError`` for anything else."""

    successes: int
    n: int

    def __post_init__(self) -> None:
        if not (self.n >= 1 and 0 <= self.successes <= self.n):
            raise ValueError(f"no proportion: {self.successes} successes out of {self.n}")

    @property
    def value(self) -> float:
        """The point estimate, in [0, 1]."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in [0, 1]."""
        return wilson_interval(self.successes, self.n)

    def to_json(self) -> dict[str, Any]:
        """Counts, value and interval; the last two are derived and only for readers."""
        return {
            "successes": self.successes,
            "n": self.n,
            "value": self.value,
            "interval": list(self.interval),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Proportion:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` if fields are missing, unknown or disagree."""
        require_fields(value, "successes", "n", "value", "interval")
        proportion = cls(_integer(value["successes"]), _integer(value["n"]))
        if abs(proportion.value - float(value["value"])) > 1e-9:
            raise ValueError(f"value {value['value']} is not {proportion.successes} / {proportion.n}")
        return proportion


Measured = Proportion | NotMeasured
"""A proportion, or the reason why there is none."""


def measured_from_json(value: Mapping[str, Any]) -> Measured:
    """Read a proportion or a "not measured" value."""
    return NotMeasured.from_json(value) if "not_measured" in value else Proportion.from_json(value)


@dataclass(frozen=True)
class TransferCell:
    """One attack, made on ``source`` within ``perturbation``, evaluated on ``target``.

    ``fooled``: fooling rate, among the images that the target gets right when clean. ``threat`` is what the
    source is to this target: ``TARGET_ITSELF`` where they are one model.
    """

    source: str
    threat: Threat
    attack: str
    target: str
    perturbation: Perturbation
    fooled: Measured

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the threat by its code."""
        return {
            "source": self.source,
            "threat": self.threat.code,
            "attack": self.attack,
            "target": self.target,
            "perturbation": self.perturbation.code,
            "fooled": self.fooled.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TransferCell:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "source", "threat", "attack", "target", "perturbation", "fooled")
        return cls(
            str(value["source"]),
            Threat.from_code(value["threat"]),
            str(value["attack"]),
            str(value["target"]),
            _perturbation(value["perturbation"]),
            measured_from_json(value["fooled"]),
        )


@dataclass(frozen=True)
class ThreatResult:
    """The per-image worst over all sources and attacks of one threat, on one target.

    An image counts as fooled if any of the attacks fools the target with it. ``sources`` names what was run.
    """

    threat: Threat
    target: str
    sources: tuple[str, ...]
    fooled: Measured

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the threat by its code."""
        return {
            "threat": self.threat.code,
            "target": self.target,
            "sources": list(self.sources),
            "fooled": self.fooled.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ThreatResult:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "threat", "target", "sources", "fooled")
        return cls(
            Threat.from_code(value["threat"]),
            str(value["target"]),
            tuple(str(source) for source in value["sources"]),
            measured_from_json(value["fooled"]),
        )


@dataclass(frozen=True)
class SelfCheck:
    """An attack's white-box success on its own source beside a strong attack's, on the same images.

    ``passed`` if the attack comes within ``margin`` (a share, 0.05 = five points) of the strong attack; never
    if one of the two was not measured. ``strong_attack`` names plainly what was run.
    """

    source: str
    attack: str
    attack_success: Measured
    strong_attack: str
    strong_success: Measured
    passed: bool
    margin: float

    def __post_init__(self) -> None:
        unmeasured = NotMeasured in (type(self.attack_success), type(self.strong_success))
        if self.passed and unmeasured:
            raise ValueError(f"the self-check of {self.attack} on {self.source} passed without being measured")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source,
            "attack": self.attack,
            "attack_success": self.attack_success.to_json(),
            "strong_attack": self.strong_attack,
            "strong_success": self.strong_success.to_json(),
            "passed": self.passed,
            "margin": self.margin,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SelfCheck:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        names = ("attack_success", "strong_attack", "strong_success", "passed", "margin")
        require_fields(value, "source", "attack", *names)
        return cls(
            str(value["source"]),
            str(value["attack"]),
            measured_from_json(value["attack_success"]),
            str(value["strong_attack"]),
            measured_from_json(value["strong_success"]),
            value["passed"] is True,
            float(value["margin"]),
        )


def require_fields(value: Mapping[str, Any], *names: str) -> None:
    """Raise ``ValueError`` unless ``value`` has exactly these fields."""
    if set(value) != set(names):
        raise ValueError(f"expected the fields {sorted(names)}, got {sorted(value)}")


def _perturbation(value: Any) -> Perturbation:
    try:
        return Perturbation.parse(value)
    except (InputError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected an integer, got {value!r}")
    return value
