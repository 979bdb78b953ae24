"""Intervals, paired tests and acceptance tests for proportions; no torch and no scipy: a device can import it.

Rules: a proportion is successes out of n; intervals are two-sided; an acceptance plan states both of its risks.
Two shares of the same images are compared as pairs; rates of a whole fleet are in ``fleet_statistics``.

>>> low, high = wilson_interval(10, 100)
>>> round(low, 4), round(high, 4)
(0.0552, 0.1744)
>>> plan = acceptance_plan(p0=0.05, p1=0.10, alpha=0.05, beta=0.05)
>>> plan.n, plan.c
(298, 21)
>>> pairs = Pairs(both=59, only_first=6, only_second=16, neither=80)
>>> round(pairs.difference, 4), round(pairs.p_value, 4)
(-0.0621, 0.0525)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from keys.errors import InputError

LARGEST_PLAN = 100_000
"""No plan asks for more images than this: its p0 and p1 are then too close to be told apart by testing."""


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    Returns ``(low, high)`` in [0, 1]; the bound on the side of an observed 0 or 1 is exactly 0 or 1.
    Raises ``ValueError`` unless 0 ≤ ``successes`` ≤ ``n``, ``n`` ≥ 1 and 0 < ``confidence`` < 1.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"no proportion: {successes} successes out of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    p = successes / n
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


@dataclass(frozen=True)
class Pairs:
    """Two yes/no answers for each of the same images, counted: McNemar's table.

    ``both``, ``only_first``, ``only_second`` and ``neither`` add up to the images; the middle two are the
    discordant pairs, and only they tell the two apart. Raises ``ValueError`` for negative counts or no image.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    def __post_init__(self) -> None:
        if min(self.both, self.only_first, self.only_second, self.neither) < 0 or self.n < 1:
            raise ValueError(f"no pairs: {self.both}, {self.only_first}, {self.only_second}, {self.neither}")

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> Pairs:
        """Count two bool arrays of the same N images; raises ``ValueError`` if their shapes differ."""
        if first.shape != second.shape or first.ndim != 1:
            raise ValueError(f"pairs need two equally long rows of answers, got {first.shape} and {second.shape}")
        a, b = first.astype(bool), second.astype(bool)
        return cls(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))

    @property
    def n(self) -> int:
        """Number of images."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Share of the first minus share of the second, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference (:func:`paired_interval`)."""
        return paired_interval(self)

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided p: binomial on the discordant pairs with probability 1/2 (McNemar 1947)."""
        return min(1.0, 2 * min(self.p_first_larger, self.p_second_larger))

    @property
    def mid_p(self) -> float:
        """The two-sided mid-p: the exact p less the probability of the observed table.

        Less conservative than the exact p, and within its level in all 9,595 cases of Fagerland, Lydersen and
        Laake (BMC Medical Research Methodology 13:91, 2013). Without a discordant pair it is 1.
        """
        discordant = self.only_first + self.only_second
        if discordant == 0:
            return 1.0
        if self.only_first == self.only_second:
            return 1 - _exactly(self.only_first, discordant) / 2
        return self.p_value - _exactly(self.only_first, discordant)

    @property
    def p_first_larger(self) -> float:
        """Exact one-sided p against "the first share is not larger than the second"; small if the first is."""
        return _at_most(self.only_second, self.only_first + self.only_second, 0.5)

    @property
    def p_second_larger(self) -> float:
        """The same with the two exchanged."""
        return _at_most(self.only_first, self.only_first + self.only_second, 0.5)

    def to_json(self) -> dict[str, Any]:
        """Counts, difference, interval and p; all but the counts are derived and only for readers."""
        return {
            "both": self.both,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "neither": self.neither,
            "difference": self.difference,
            "interval": list(self.interval),
            "p_value": self.p_value,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pairs:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` if fields are missing, unknown or disagree."""
        counts = [value.get(name) for name in ("both", "only_first", "only_second", "neither")]
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise ValueError(f"no pairs: {dict(value)!r}")
        pairs = cls(*(int(value[name]) for name in ("both", "only_first", "only_second", "neither")))
        if set(value) != set(pairs.to_json()) or abs(pairs.difference - float(value["difference"])) > 1e-9:
            raise ValueError(f"fields that do not belong to {pairs}: {dict(value)!r}")
        return pairs


def paired_interval(pairs: Pairs, confidence: float = 0.95) -> tuple[float, float]:
    """Newcombe's score interval for the difference of two paired proportions, ``(low, high)`` in [-1, 1].

    Newcombe, Statistics in Medicine 17 (1998) 2635, method 10: Wilson's intervals of both shares, squared and
    added with the correlation φ, whose numerator is corrected for continuity. It keeps a width where there is no
    discordant pair. Raises ``ValueError`` unless 0 < ``confidence`` < 1.
    """
    n, first, second = pairs.n, pairs.both + pairs.only_first, pairs.both + pairs.only_second
    low1, high1 = wilson_interval(first, n, confidence)
    low2, high2 = wilson_interval(second, n, confidence)
    p1, p2 = first / n, second / n
    product = first * (n - first) * second * (n - second)
    excess = pairs.both * pairs.neither - pairs.only_first * pairs.only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)
    phi = excess / math.sqrt(product) if product else 0.0

    def length(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    low = p1 - p2 - length(p1 - low1, high2 - p2)
    high = p1 - p2 + length(high1 - p1, p2 - low2)
    return max(-1.0, low), min(1.0, high)


@dataclass(frozen=True)
class Risks:
    """What an acceptance test promises: rates p0 < p1 with the largest error allowed at each of them.

    ``p0``: acceptable rate, rejected with probability at most ``alpha`` (the producer's risk).
    ``p1``: unacceptable rate, accepted with probability at most ``beta`` (the consumer's risk).
    Raises :class:`InputError` for values that state no test.
    """

    p0: float
    p1: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.p0 < self.p1 < 1:
            raise InputError(
                f"The acceptance test needs 0 < p0 < p1 < 1, not p0 = {self.p0} and p1 = {self.p1}; "
                "set p0 to a fooling rate that is acceptable and p1 to one that is not."
            )
        for name, risk in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 < risk < 0.5:
                raise InputError(f"The acceptance test needs 0 < {name} < 0.5, not {risk}; 0.05 is the usual choice.")


@dataclass(frozen=True)
class AcceptancePlan:
    """Look at ``n`` images and accept if at most ``c`` are fooled; the risks are the exact binomial ones.

    ``producer_risk`` = P(X > c | p0) and ``consumer_risk`` = P(X ≤ c | p1), X binomial with n trials.
    """

    n: int
    c: int
    producer_risk: float
    consumer_risk: float


def acceptance_plan(p0: float, p1: float, alpha: float, beta: float) -> AcceptancePlan:
    """Return the single-sampling plan with the fewest images that keeps both risks.

    For a fixed c the consumer's risk falls with n and the producer's rises, so that the feasible n form an
    interval whose ends grow with c; the first c with a non-empty interval gives the smallest n
    (Guenther 1969, "Use of the binomial, hypergeometric and Poisson tables to obtain sampling plans").
    Raises :class:`InputError` for impossible rates or risks, or if more than ``LARGEST_PLAN`` images were needed.
    """
    risks = Risks(p0, p1, alpha, beta)
    # The normal approximation is good to a few percent where it matters: far beyond the largest plan.
    spread = NormalDist().inv_cdf(1 - alpha) * math.sqrt(p0 * (1 - p0))
    spread += NormalDist().inv_cdf(1 - beta) * math.sqrt(p1 * (1 - p1))
    if (spread / (p1 - p0)) ** 2 > LARGEST_PLAN:
        raise InputError(
            f"Telling p0 = {p0} from p1 = {p1} at risks of {alpha} and {beta} takes more than {LARGEST_PLAN} "
            "images per device; set p0 and p1 further apart or allow larger risks."
        )
    n, c = 1, 0
    while True:
        while _at_most(c, n, p1) > beta:
            n += 1
        if 1 - _at_most(c, n, p0) <= alpha:
            return plan_at(n, risks)
        c += 1
        n = max(n, c + 1)


def plan_at(n: int, risks: Risks) -> AcceptancePlan:
    """Return the plan for exactly ``n`` images whose limit c makes the larger of the two relative risks smallest.

    The relative risks are producer_risk / alpha and consumer_risk / beta; one of them may be above 1, which
    :func:`keeps` tells.
    """
    producer, consumer = _risk_curves(n, risks)
    c = int(np.argmin(np.maximum(producer / risks.alpha, consumer / risks.beta)))
    return AcceptancePlan(n, c, float(producer[c]), float(consumer[c]))


def keeps(plan: AcceptancePlan, risks: Risks) -> bool:
    """Tell whether the plan's exact risks are both within what was promised."""
    return plan.producer_risk <= risks.alpha and plan.consumer_risk <= risks.beta


def plan_within(available: int, risks: Risks) -> AcceptancePlan | None:
    """Return the plan with the most images, at most ``available``, that keeps both risks; ``None`` if none does.

    More images than the smallest plan needs are used, because they make both errors rarer. The limit is the
    balanced one of :func:`plan_at`: the limit that only just keeps α drifts towards p0 as n grows (many images
    would then reject what is nearly acceptable), the one that only just keeps β drifts towards p1. Binomial
    risks are a sawtooth, so that a few n above the smallest plan have no limit that keeps both (0.05/0.10:
    301–309 and 318–320); then the next smaller n is taken and the images beyond it are left out of the test.
    """
    smallest = acceptance_plan(risks.p0, risks.p1, risks.alpha, risks.beta).n
    for n in range(available, smallest - 1, -1):
        plan = plan_at(n, risks)
        if keeps(plan, risks):
            return plan
    return None


def at_least_once(risk: float, tests: int) -> float:
    """Chance that at least one of ``tests`` independent tests errs, each with probability ``risk``.

    One release test per device at α = 5 % rejects at least one of ten good devices with probability 40 %.

    >>> round(at_least_once(0.05, 10), 3)
    0.401
    """
    if not (0 <= risk <= 1 and tests >= 0):
        raise ValueError(f"no risk of {tests} tests: {risk}")
    return 1 - (1 - risk) ** tests


def images_to_attack(judged: int, accuracy: float, confidence: float = 0.99) -> int:
    """How many images to attack so that at least ``judged`` of them are right when clean.

    ``accuracy``: the target's clean accuracy in (0, 1]; the number is enough with probability ``confidence``.
    Raises ``ValueError`` for an accuracy or a confidence that is no such probability.

    >>> images_to_attack(298, 0.9)
    346
    """
    if not (judged >= 0 and 0 < accuracy <= 1 and 0 < confidence < 1):
        raise ValueError(f"no number of images for {judged} judged ones at accuracy {accuracy} and {confidence}")
    if judged == 0 or accuracy == 1:
        return judged
    few, many = judged - 1, judged
    while _at_most(judged - 1, many, accuracy) > 1 - confidence:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        if _at_most(judged - 1, middle, accuracy) > 1 - confidence:
            few = middle
        else:
            many = middle
    return many


def _exactly(k: int, n: int) -> float:
    """P(X = k), X binomial(n, 1/2), n ≥ 0."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def _at_most(c: int, n: int, p: float) -> float:
    """P(X ≤ c), X binomial(n, p) with 0 < p < 1, by its terms in log space."""
    start = n * math.log1p(-p)
    odds = math.log(p) - math.log1p(-p)
    total, log_choose = [], 0.0
    for k in range(min(c, n) + 1):
        total.append(math.exp(start + log_choose + k * odds))
        log_choose += math.log((n - k) / (k + 1)) if k < n else 0.0
    return math.fsum(total)


def _risk_curves(n: int, risks: Risks) -> tuple[np.ndarray, np.ndarray]:
    """P(X > c | p0) and P(X ≤ c | p1) for c = 0 … n."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]

    def terms(p: float) -> np.ndarray:
        return np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))

    # Summed from the far end, so that small upper tails keep their digits.
    upper = np.cumsum(terms(risks.p0)[::-1])[::-1]
    return np.concatenate([upper[1:], [0.0]]), np.cumsum(terms(risks.p1))
