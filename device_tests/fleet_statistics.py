"""Rates of a whole fleet, with intervals over devices *and* images.

Rules: the devices are a sample of the fleet that one key generator could make, the images a sample of the images
that a device could be shown, and an interval answers for both. Every device has its own judged images, those it
gets right when clean, and every device counts the same. Where no interval can be given the figure is not measured.

A bootstrap over devices and images is too narrow for few uneven devices (nominal 95 % covers 86 % with three). Here
the variance is split into what devices and what images add (two-way clustering: Cameron, Gelbach and Miller, J.
Business & Economic Statistics 29 (2011) 238; Owen, Annals of Applied Statistics 1 (2007) 386), and the critical value
is the mean of the t and the normal one, weighted by these parts (Cochran and Cox, Experimental Designs, 2nd ed. 1957);
two groups of devices share Welch's degrees of freedom. With normal errors the interval of one rate covers 95.0 to
97.1 % for three devices and more, whatever the parts are; for fooling rates see docs/statistics.md.

>>> fooled = np.arange(1200).reshape(4, 300) % 7 == 0
>>> fleet_rate(fooled, np.ones((4, 300), dtype=bool)).devices
4
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import expit, logit, stdtrit

from device_tests.evidence import require_fields
from device_tests.statistics import wilson_interval
from exporters.measured import NotMeasured

CONFIDENCE = 0.95

LEAST_IMAGES = 30
"""A device that judges fewer images than this has no usable rate of its own."""

FLOOR = 0.25
"""Share of the variance that images alone cause below which the whole variance is never taken to be.

Three devices may have equal rates by chance; without a floor their interval would have no width.
"""

RATE_METHOD = "Cochran-Cox t over devices and images, logit scale, 95 %"
DIFFERENCE_METHOD = "Cochran-Cox t over devices and images, square-and-add, 95 %"


@dataclass(frozen=True)
class FleetRate:
    """Mean fooling rate of a fleet, every device counting the same, with its 95 % interval, all in [0, 1].

    ``devices``: how many were judged. ``images``: how many were judged on at least one of them.
    """

    mean: float
    low: float
    high: float
    devices: int
    images: int
    method: str = RATE_METHOD

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.mean <= self.high <= 1 and self.devices >= 1 and self.images >= 1):
            raise ValueError(f"no rate of a fleet: {self.mean} in [{self.low}, {self.high}]")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "mean": self.mean,
            "interval": [self.low, self.high],
            "devices": self.devices,
            "images": self.images,
            "method": self.method,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FleetRate:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "mean", "interval", "devices", "images", "method")
        low, high = (float(end) for end in value["interval"])
        counts = (int(value["devices"]), int(value["images"]))
        return cls(float(value["mean"]), low, high, *counts, method=str(value["method"]))


@dataclass(frozen=True)
class FleetDifference:
    """Difference of two mean rates, first minus second, with its 95 % interval, all in [-1, 1].

    ``devices``: of the first and of the second group; for two arms on the same devices both are that number.
    """

    difference: float
    low: float
    high: float
    devices: tuple[int, int]
    images: int
    method: str = DIFFERENCE_METHOD

    def __post_init__(self) -> None:
        if not -1 <= self.low <= self.difference <= self.high <= 1:
            raise ValueError(f"no difference of rates: {self.difference} in [{self.low}, {self.high}]")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "difference": self.difference,
            "interval": [self.low, self.high],
            "devices": list(self.devices),
            "images": self.images,
            "method": self.method,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FleetDifference:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "difference", "interval", "devices", "images", "method")
        low, high = (float(end) for end in value["interval"])
        first, second = (int(count) for count in value["devices"])
        images = int(value["images"])
        return cls(float(value["difference"]), low, high, (first, second), images, method=str(value["method"]))


def fleet_rate(fooled: np.ndarray, judged: np.ndarray) -> FleetRate | NotMeasured:
    """Mean fooling rate over devices, and its interval over devices and images.

    ``fooled``, ``judged``: bool D×N, device × image; a device's rate is taken over its judged images only. Two
    devices give an interval, but one as wide as two devices allow. Not measured for one device, or where a device
    judges fewer than ``LEAST_IMAGES`` images. Raises ``ValueError`` if the shapes differ.
    """
    reason = unusable(judged, "the fleet")
    if reason is not None:
        return NotMeasured(reason)
    used = judged.any(axis=0)
    sample = sample_of(fooled[:, used], judged[:, used])
    variance = _variance([sample], sample.over_images)
    low, high = _logit_interval(sample, math.sqrt(variance.value), variance.multiple)
    return FleetRate(sample.mean, low, high, len(judged), int(used.sum()))


def group_difference(
    first: np.ndarray, first_judged: np.ndarray, second: np.ndarray, second_judged: np.ndarray
) -> FleetDifference | NotMeasured:
    """Mean rate of one group of devices minus that of another, on the same images: for example un-keyed minus keyed.

    ``first``, ``first_judged``: bool D₁×N; ``second``, ``second_judged``: bool D₂×N with the same N images in the
    same order. Not measured where :func:`fleet_rate` of either group is not; a single control device shows no
    spread, and then only devices can be compared one by one (:class:`~device_tests.statistics.Pairs`).
    Raises ``ValueError`` if the shapes do not fit.
    """
    for judged, name in ((first_judged, "the first group"), (second_judged, "the second group")):
        reason = unusable(judged, name)
        if reason is not None:
            return NotMeasured(reason)
    if first_judged.shape[1] != second_judged.shape[1]:
        raise ValueError(f"groups on different images: {first_judged.shape} and {second_judged.shape}")
    used = first_judged.any(axis=0) | second_judged.any(axis=0)
    one = sample_of(first[:, used], first_judged[:, used])
    other = sample_of(second[:, used], second_judged[:, used])
    variance = _variance([one, other], one.over_images - other.over_images)
    difference = one.mean - other.mean
    low, high = _square_and_add(difference, one, other, variance)
    return FleetDifference(difference, low, high, (len(first), len(second)), int(used.sum()))


def arm_difference(first: np.ndarray, second: np.ndarray, judged: np.ndarray) -> FleetDifference | NotMeasured:
    """Mean rate under one attack minus that under another, on the same devices and images.

    ``first``, ``second``, ``judged``: bool D×N. As in McNemar's test only the answers matter in which the two
    disagree. Not measured where :func:`fleet_rate` is not. Raises ``ValueError`` if the shapes differ.
    """
    reason = unusable(judged, "the fleet")
    if reason is not None:
        return NotMeasured(reason)
    used = judged.any(axis=0)
    a, b, mask = first[:, used].astype(bool), second[:, used].astype(bool), judged[:, used]
    only_first, only_second = sample_of(a & ~b, mask), sample_of(b & ~a, mask)
    both = Sample(only_first.rates - only_second.rates, only_first.influence - only_second.influence, only_first.fewest)
    variance = _variance([both], both.over_images)
    low, high = _square_and_add(both.mean, only_first, only_second, variance)
    return FleetDifference(both.mean, low, high, (len(judged), len(judged)), int(used.sum()))


@dataclass(frozen=True, eq=False)
class Sample:
    """Rates of D devices on N images, and how much each image moves them.

    ``rates``: float D. ``influence``: float D×N, (outcome − rate)·N/n on a device's n judged images and 0 elsewhere:
    the linear part of a ratio, so that a row's mean is the rate's error. ``fewest``: the least n.
    """

    rates: np.ndarray
    influence: np.ndarray
    fewest: int

    @property
    def mean(self) -> float:
        """The mean rate over devices."""
        return float(self.rates.mean())

    @property
    def over_images(self) -> np.ndarray:
        """How much each image moves the mean over devices: float N."""
        return self.influence.mean(axis=0)

    @property
    def between_devices(self) -> float:
        """Variance of the mean as the devices' spread shows it."""
        return float(self.rates.var(ddof=1)) / len(self.rates)

    @property
    def interaction(self) -> float:
        """Variance of the mean from what is peculiar to one image on one device."""
        devices, images = self.influence.shape
        rest = self.influence - self.over_images
        return float((rest**2).sum()) / ((devices - 1) * (images - 1) * devices * images)


def sample_of(outcomes: np.ndarray, judged: np.ndarray) -> Sample:
    """Sample of outcomes (bool, or float in [0, 1]) D×N where bool D×N ``judged`` is true."""
    if outcomes.shape != judged.shape:
        raise ValueError(f"outcomes {outcomes.shape} for judged images {judged.shape}")
    values = np.where(judged, outcomes, 0).astype(np.float64)
    counts = judged.sum(axis=1)
    rates = values.sum(axis=1) / counts
    influence = np.where(judged, values - rates[:, None], 0) * (judged.shape[1] / counts)[:, None]
    return Sample(rates, influence, int(counts.min()))


@dataclass(frozen=True)
class _Variance:
    """Variance of an estimate, and how many of its roots make half an interval."""

    value: float
    multiple: float


def _variance(samples: Sequence[Sample], over_images: np.ndarray) -> _Variance:
    """Variance of a sum of independent groups' means; ``over_images``: how much each image moves that sum, float N."""
    spreads = [sample.between_devices for sample in samples]
    devices, normal = sum(spreads), NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    given_devices = float(over_images.var(ddof=1)) / len(over_images)
    # Both the devices' spread and the images' contain the interaction; it is counted once.
    interaction = sum(sample.interaction for sample in samples)
    least = FLOOR * max(given_devices, interaction) - devices
    images = max(given_devices - interaction, least, 0.0)
    if devices == 0:
        return _Variance(images, normal)
    # Welch's degrees of freedom; one group has its own D − 1.
    squares = sum(spread**2 / (len(sample.rates) - 1) for spread, sample in zip(spreads, samples, strict=True))
    tail = float(stdtrit(devices**2 / squares, 0.5 + CONFIDENCE / 2))
    return _Variance(devices + images, (tail * devices + normal * images) / (devices + images))


def _logit_interval(sample: Sample, deviation: float, multiple: float) -> tuple[float, float]:
    """Interval of a mean rate: symmetric on the logit scale, so that it stays in [0, 1] and is wider inwards.

    A mean of 0 or 1 has no spread; then every image counts once, however many devices saw it (Wilson).
    """
    p = sample.mean
    if p <= 0 or p >= 1:
        return wilson_interval(round(p) * sample.fewest, sample.fewest, CONFIDENCE)
    half = multiple * deviation / (p * (1 - p))
    return min(p, float(expit(logit(p) - half))), max(p, float(expit(logit(p) + half)))


def _square_and_add(difference: float, one: Sample, other: Sample, variance: _Variance) -> tuple[float, float]:
    """Interval of a difference from both rates' own intervals and their correlation (as Newcombe 1998, method 10).

    It is ``multiple`` deviations wide, but on each side in the shape of the intervals that reach there.
    """
    parts = [_variance([sample], sample.over_images).value for sample in (one, other)]
    roots = [math.sqrt(part) for part in parts]
    (low1, high1), (low2, high2) = (
        _logit_interval(sample, root, variance.multiple) for sample, root in zip((one, other), roots, strict=True)
    )
    shared = sum(parts) - variance.value

    def length(first: float, second: float) -> float:
        squares, scaled = 0.0, []
        for reach, part, root in zip((first, second), parts, roots, strict=True):
            # Without a spread (a rate of 0 or 1) the reach is Wilson's and shares nothing with the other rate.
            squares += reach * reach if part == 0 else 0.0
            scaled.append(reach / root if part > 0 else 0.0)
        squares += sum(part * scale * scale for part, scale in zip(parts, scaled, strict=True))
        if min(parts) > 0:
            squares -= shared * scaled[0] * scaled[1]
        return math.sqrt(max(0.0, squares))

    low = difference - length(one.mean - low1, high2 - other.mean)
    high = difference + length(high1 - one.mean, other.mean - low2)
    return max(-1.0, low), min(1.0, high)


def unusable(judged: np.ndarray, name: str) -> str | None:
    """Return why a group of devices, with bool D×N ``judged``, gives no interval; ``None`` if it does."""
    if judged.ndim != 2:
        raise ValueError(f"expected judged images of {name} as device × image, got the shape {judged.shape}")
    if len(judged) < 2:
        return f"{name} has {len(judged)} device; the spread between devices takes two at least, ten for a claim"
    fewest = int(judged.sum(axis=1).min())
    if fewest < LEAST_IMAGES:
        return f"a device of {name} judges {fewest} images; its rate takes {LEAST_IMAGES} at least"
    return None
