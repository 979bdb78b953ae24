"""Wilson intervals and acceptance plans against scipy and published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from device_tests.statistics import (
    Risks,
    acceptance_plan,
    keeps,
    plan_at,
    plan_within,
    wilson_interval,
)
from keys.errors import InputError

FIVE_TEN = Risks(p0=0.05, p1=0.10, alpha=0.05, beta=0.05)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, n, confidence)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_of_newcombes_published_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, n)


def test_the_published_plan_for_five_and_ten_percent() -> None:
    plan = acceptance_plan(0.05, 0.10, 0.05, 0.05)
    assert (plan.n, plan.c) == (298, 21)
    assert plan.producer_risk == pytest.approx(binom.sf(21, 298, 0.05), rel=1e-9)
    assert plan.consumer_risk == pytest.approx(binom.cdf(21, 298, 0.10), rel=1e-9)
    assert keeps(plan, FIVE_TEN)


def test_239_images_reject_a_good_device_too_often() -> None:
    plan = plan_at(239, FIVE_TEN)
    assert not keeps(plan, FIVE_TEN)
    # With the limit that just keeps the consumer's risk, c = 16, one good device in eleven is rejected.
    assert binom.cdf(16, 239, 0.10) <= 0.05 < binom.cdf(17, 239, 0.10)
    assert binom.sf(16, 239, 0.05) == pytest.approx(0.093, abs=5e-4)


@pytest.mark.parametrize("rates", [(0.02, 0.05), (0.05, 0.10), (0.10, 0.20), (0.30, 0.45), (0.50, 0.60)])
@pytest.mark.parametrize("risks", [(0.05, 0.05), (0.01, 0.10)])
def test_no_smaller_plan_keeps_both_risks(rates: tuple[float, float], risks: tuple[float, float]) -> None:
    plan = acceptance_plan(*rates, *risks)
    assert feasible_limits(plan.n, *rates, *risks).tolist().count(plan.c) == 1
    assert all(len(feasible_limits(n, *rates, *risks)) == 0 for n in range(max(1, plan.n - 150), plan.n))


def feasible_limits(n: int, p0: float, p1: float, alpha: float, beta: float) -> np.ndarray:
    c = np.arange(n + 1)
    return c[(binom.sf(c, n, p0) <= alpha) & (binom.cdf(c, n, p1) <= beta)]


def test_more_images_than_needed_make_both_risks_smaller_and_keep_the_limit_between_the_rates() -> None:
    smallest = acceptance_plan(0.05, 0.10, 0.05, 0.05)
    large = plan_within(3000, FIVE_TEN)
    assert large is not None
    assert large.n == 3000
    assert large.producer_risk < 1e-4 < smallest.producer_risk
    assert large.consumer_risk < 1e-4 < smallest.consumer_risk
    assert 0.065 < large.c / large.n < 0.08
    assert large.consumer_risk == pytest.approx(binom.cdf(large.c, 3000, 0.10), rel=1e-6)
    assert large.producer_risk == pytest.approx(binom.sf(large.c, 3000, 0.05), rel=1e-6)


def test_every_number_of_images_gets_a_plan_that_keeps_both_risks_or_none() -> None:
    for available in range(280, 420):
        plan = plan_within(available, FIVE_TEN)
        if available < 298:
            assert plan is None
        else:
            assert plan is not None
            assert plan.n <= available
            assert plan.c in feasible_limits(plan.n, 0.05, 0.10, 0.05, 0.05)
    # The sawtooth: at 301 … 309 no limit keeps both risks, so 300 images are used.
    assert {plan_within(n, FIVE_TEN).n for n in range(300, 310)} == {300}  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [(0.1, 0.1, 0.05, 0.05), (0.0, 0.1, 0.05, 0.05), (0.2, 0.1, 0.05, 0.05)])
def test_rates_that_state_no_test_are_refused(bad: tuple[float, float, float, float]) -> None:
    with pytest.raises(InputError, match="p0 < p1"):
        acceptance_plan(*bad)


def test_risks_that_state_no_test_are_refused() -> None:
    with pytest.raises(InputError, match="alpha"):
        acceptance_plan(0.05, 0.1, 0.5, 0.05)
    with pytest.raises(InputError, match="beta"):
        acceptance_plan(0.05, 0.1, 0.05, 0.0)


def test_rates_too_close_to_be_told_apart_are_refused() -> None:
    with pytest.raises(InputError, match="further apart"):
        acceptance_plan(0.05, 0.0501, 0.05, 0.05)
