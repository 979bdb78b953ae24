"""Intervals and acceptance tests for proportions; no torch and no scipy, so that a device can import it.

Rules: a proportion is successes out of n; intervals are two-sided; an acceptance plan states both of its risks.

>>> low, high = wilson_interval(10, 100)
>>> round(low, 4), round(high, 4)
(0.0552, 0.1744)
>>> plan = acceptance_plan(p0=0.05, p1=0.10, alpha=0.05, beta=0.05)
>>> plan.n, plan.c
(298, 21)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

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
