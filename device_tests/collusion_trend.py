"""How the fooling rate grows with the number of colluding devices: three curves, the best one, and its limits.

Rules: the curves are chosen by how well they fit and by nothing else; every prediction carries an interval, what the
other curves say, and a sentence about how far it reaches beyond what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import expit, logit

from device_tests.evidence import require_fields
from device_tests.fleet_statistics import CONFIDENCE, sample_of, unusable
from exporters.measured import NotMeasured

LEAST_POINTS = 5
"""A trend needs this many numbers of colluding devices: two parameters, a scale, and something left over."""

LARGEST_STEEPNESS = 50.0
"""Bound of the logistic curve's parameters, far beyond any that counted data could tell from it."""


@dataclass(frozen=True)
class Curve:
    """One curve fitted to rates against k: its model, its two parameters, and Akaike's corrected criterion.

    ``linear``: a + b·k, cut to [0, 1]. ``saturating``: a·(1 − exp(−b·k)). ``logistic``: 1 / (1 + exp(−a − b·ln k)).
    The lower ``aicc`` (Hurvich and Tsai, Biometrika 76 (1989) 297), the better; differences below 2 say nothing.
    """

    model: str
    a: float
    b: float
    aicc: float

    def at(self, k: float) -> float:
        """The fitted rate for ``k`` ≥ 1 colluding devices, in [0, 1]."""
        return float(_MODELS[self.model].values(np.array([k], dtype=np.float64), self.a, self.b)[0])


@dataclass(frozen=True)
class Prediction:
    """A fooling rate for ``k`` colluding devices by the best curve, with a 95 % interval.

    The interval counts that devices and images are samples and that other samples may choose another curve.
    ``by_model``: what each curve says, best first.
    """

    k: int
    value: float
    low: float
    high: float
    by_model: tuple[float, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Prediction:
        """Read what ``Trend.to_json`` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "k", "value", "low", "high", "by_model")
        figures = (float(value["value"]), float(value["low"]), float(value["high"]))
        return cls(int(value["k"]), *figures, by_model=tuple(float(rate) for rate in value["by_model"]))


@dataclass(frozen=True)
class Trend:
    """Fooling rate against the number k of colluding devices. ``curves``: best first. ``caveat``: to be shown."""

    k: tuple[int, ...]
    rates: tuple[float, ...]
    curves: tuple[Curve, ...]
    predictions: tuple[Prediction, ...]
    devices: int
    images: int
    caveat: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trend:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "k", "rates", "curves", "predictions", "devices", "images", "caveat")
        for part in value["curves"]:
            require_fields(part, "model", "a", "b", "aicc")
        return cls(
            tuple(int(k) for k in value["k"]),
            tuple(float(rate) for rate in value["rates"]),
            tuple(Curve(**part) for part in value["curves"]),
            tuple(Prediction.from_json(part) for part in value["predictions"]),
            int(value["devices"]),
            int(value["images"]),
            str(value["caveat"]),
        )


def collusion_trend(
    k: Sequence[int],
    fooled: np.ndarray,
    judged: np.ndarray,
    *,
    predict: Sequence[int] = (16, 100, 10_000),
    draws: int = 400,
    seed: int = 0,
) -> Trend | NotMeasured:
    """Fit the mean fooling rate against the number of colluding devices, and say what the fit says for ``predict``.

    ``k``: K different numbers ≥ 1. ``fooled``: K×D×N, bool or, averaged over several coalitions of one size, float
    in [0, 1]: target × image for each k, the same targets and images throughout. ``judged``: bool D×N, or K×D×N
    where a target that is in a coalition judges nothing for that k. The fits are least squares weighted by the
    inverse variance. The interval is a parametric bootstrap of ``draws`` redrawn and refitted curves: the device
    part of the covariance of the K rates is redrawn with its χ² uncertainty, so that few targets give wide bands.
    Not measured with fewer than ``LEAST_POINTS`` numbers, three targets, or ``LEAST_IMAGES`` images of a target.
    Raises ``ValueError`` if the shapes do not fit or a number is repeated.
    """
    numbers = np.array(k, dtype=np.float64)
    masks = np.broadcast_to(judged, fooled.shape)
    if fooled.ndim != 3 or len(fooled) != len(numbers) or len(set(k)) != len(k) or (numbers < 1).any():
        raise ValueError(f"expected outcomes K×D×N for {len(k)} different numbers ≥ 1, got {fooled.shape} for {k}")
    if len(k) < LEAST_POINTS:
        return NotMeasured(f"a trend takes {LEAST_POINTS} numbers of colluding devices at least, not {len(k)}")
    if fooled.shape[1] < 3:
        return NotMeasured(f"a trend takes three targets at least, not {fooled.shape[1]}")
    for mask in masks:
        reason = unusable(mask, "the targets")
        if reason is not None:
            return NotMeasured(reason)
    used = masks.any(axis=(0, 1))
    samples = [sample_of(values[:, used], mask[:, used]) for values, mask in zip(fooled, masks, strict=True)]
    targets, images = samples[0].influence.shape
    rates = np.array([sample.mean for sample in samples])
    between = np.atleast_2d(np.cov([sample.rates for sample in samples])) / targets
    # The interaction is left in both parts: never too narrow, and a covariance in any case.
    given = np.atleast_2d(np.cov([sample.over_images for sample in samples])) / images
    smoothed = (rates * images + 0.5) / (images + 1)
    weights = 1 / (np.diag(between) + np.maximum(np.diag(given), smoothed * (1 - smoothed) / (images * targets)))
    curves = _fit(numbers, rates, weights)
    rng = np.random.default_rng(seed)
    stretch = np.sqrt((targets - 1) / rng.chisquare(targets - 1, draws))[:, None]
    redrawn = rates + stretch * _normal(rng, between, draws) + _normal(rng, given, draws)
    refitted = [_fit(numbers, row, weights)[0] for row in redrawn.clip(0, 1)]
    predictions: list[Prediction] = []
    for number in predict:
        values = [curve.at(number) for curve in refitted]
        low, high = (float(end) for end in np.quantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2]))
        by_model = tuple(curve.at(number) for curve in curves)
        predictions.append(Prediction(number, by_model[0], min(low, by_model[0]), max(high, by_model[0]), by_model))
    caveat = _caveat(int(numbers.max()), predictions, curves)
    return Trend(tuple(k), tuple(rates.tolist()), curves, tuple(predictions), targets, images, caveat)


def _normal(rng: np.random.Generator, covariance: np.ndarray, draws: int) -> np.ndarray:
    """Draws from a normal distribution with mean 0 and a covariance that may be singular: draws×K."""
    values, vectors = np.linalg.eigh(covariance)
    return (rng.standard_normal((draws, len(values))) * np.sqrt(np.maximum(values, 0))) @ vectors.T


class _Model(Protocol):
    def values(self, k: np.ndarray, a: Any, b: Any) -> np.ndarray: ...

    def fit(self, k: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> tuple[float, float]: ...


class _Linear:
    def values(self, k: np.ndarray, a: Any, b: Any) -> np.ndarray:
        return np.clip(a + b * k, 0, 1)

    def fit(self, k: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        mean_k, mean = np.average(k, weights=weights), np.average(rates, weights=weights)
        b = float((weights * (k - mean_k) * (rates - mean)).sum() / (weights * (k - mean_k) ** 2).sum())
        return float(mean - b * mean_k), b


class _Saturating:
    # b from "no bend to be seen" to "flat from the first device on"; for each b the best a has a closed form.
    steps = np.geomspace(1e-4, 20, 1500)[:, None]

    def values(self, k: np.ndarray, a: Any, b: Any) -> np.ndarray:
        return a * -np.expm1(-b * k)

    def fit(self, k: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        shape = -np.expm1(-self.steps * k)
        a = ((weights * shape * rates).sum(axis=1) / (weights * shape**2).sum(axis=1)).clip(0, 1)
        best = int((weights * (rates - a[:, None] * shape) ** 2).sum(axis=1).argmin())
        return float(a[best]), float(self.steps[best, 0])


class _Logistic:
    def values(self, k: np.ndarray, a: Any, b: Any) -> np.ndarray:
        return expit(a + b * np.log(k))

    def fit(self, k: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        logs = np.log(k)
        inside = rates.clip(0.002, 0.998)
        b, a = np.polyfit(logs, logit(inside), 1, w=np.sqrt(weights) * inside * (1 - inside))

        def curve(log_k: np.ndarray, a: float, b: float) -> np.ndarray:
            return expit(a + b * log_k)

        def slopes(log_k: np.ndarray, a: float, b: float) -> np.ndarray:
            steep = curve(log_k, a, b) * (1 - curve(log_k, a, b))
            return np.stack([steep, steep * log_k], axis=1)

        start = np.clip([a, b], -0.99 * LARGEST_STEEPNESS, 0.99 * LARGEST_STEEPNESS)
        bounds = (-LARGEST_STEEPNESS, LARGEST_STEEPNESS)
        found, _ = curve_fit(curve, logs, rates, p0=start, sigma=1 / np.sqrt(weights), jac=slopes, bounds=bounds)
        return float(found[0]), float(found[1])


_MODELS: Mapping[str, _Model] = {"linear": _Linear(), "saturating": _Saturating(), "logistic": _Logistic()}


def _fit(k: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> tuple[Curve, ...]:
    """All models by weighted least squares, best first; AICc with the scale as a third parameter."""
    curves: list[Curve] = []
    points, parameters = len(k), 3
    for name, model in _MODELS.items():
        a, b = model.fit(k, rates, weights)
        rest = float((weights * (rates - model.values(k, a, b)) ** 2).sum()) / points
        criterion = points * math.log(max(rest, 1e-12)) + 2 * parameters
        criterion += 2 * parameters * (parameters + 1) / (points - parameters - 1)
        curves.append(Curve(name, a, b, criterion))
    return tuple(sorted(curves, key=lambda curve: curve.aicc))


def _caveat(largest: int, predictions: Sequence[Prediction], curves: Sequence[Curve]) -> str:
    text = f"Measured up to {largest} colluding devices. "
    far = max(predictions, key=lambda prediction: prediction.k, default=None)
    if far is None or far.k <= largest:
        return text + "Beyond that the curve is a guess."
    said = ", ".join(f"{curve.model} {value:.2f}" for curve, value in zip(curves, far.by_model, strict=True))
    near = [curve.model for curve in curves if curve.aicc - curves[0].aicc < 2]
    choice = f"the {near[0]} curve fits best" if len(near) == 1 else f"{' and '.join(near)} fit about equally well"
    return (
        f"{text}{far.k:,} is {far.k / largest:,.0f} times as many, and nothing was measured there: the figure says "
        f"what the curve does, not what a fleet will do. The curves say {said}; {choice}."
    )
