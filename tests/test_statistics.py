"""Wilson intervals, paired tests and acceptance plans against scipy and published values."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from device_tests.statistics import (
    Pairs,
    Risks,
    acceptance_plan,
    at_least_once,
    images_to_attack,
    keeps,
    paired_interval,
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


@pytest.mark.parametrize(
    ("rates", "risks", "n", "c"), [((0.01, 0.05), (0.05, 0.10), 132, 3), ((0.01, 0.05), (0.02, 0.15), 144, 4)]
)
def test_plans_published_elsewhere(rates: tuple[float, float], risks: tuple[float, float], n: int, c: int) -> None:
    # The manual of the R package AccSamplingDesign, version 0.0.8.
    plan = acceptance_plan(*rates, *risks)
    assert (plan.n, plan.c) == (n, c)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 2635, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((0, 30, 0, 0), 0.8395, 1.0),
        # Cavo et al. 2012 by the R package contingencytables (Fagerland, Lydersen and Laake 2017, chapter 8).
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_the_paired_interval_of_published_examples(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert Pairs(*table).interval == pytest.approx((low, high), abs=5.1e-5)


def test_mcnemars_p_of_a_published_example() -> None:
    # Bentur et al. 2009 in Fagerland, Lydersen and Laake, BMC Med. Res. Methodol. 13:91 (2013), table 1.
    pairs = Pairs(both=1, only_first=1, only_second=7, neither=12)
    assert pairs.p_value == pytest.approx(0.0703, abs=5e-5)
    assert pairs.mid_p == pytest.approx(0.0391, abs=5e-5)
    assert pairs.difference == pytest.approx(-6 / 21)


tables = st.tuples(*[st.integers(0, 400)] * 4).filter(any)


@given(tables)
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_scipys_binomial_test(table: tuple[int, int, int, int]) -> None:
    pairs = Pairs(*table)
    _, b, c, _ = table
    if b + c:
        assert pairs.p_value == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-9)
        assert pairs.p_first_larger == pytest.approx(binomtest(b, b + c, alternative="greater").pvalue, rel=1e-9)
        assert pairs.p_second_larger == pytest.approx(binomtest(b, b + c, alternative="less").pvalue, rel=1e-9)
        # Fagerland, Lydersen and Laake 2013, supplement: equations 2 and the line below it.
        observed = binom.pmf(b, b + c, 0.5)
        middle = 1 - observed / 2 if b == c else binomtest(b, b + c).pvalue - observed
        assert pairs.mid_p == pytest.approx(middle, rel=1e-9)
        assert pairs.mid_p <= pairs.p_value
    else:
        assert pairs.p_value == pairs.mid_p == 1


@given(tables, st.floats(0.5, 0.999))
@settings(max_examples=50, deadline=None)
def test_the_paired_interval_holds_its_estimate_and_turns_with_the_pairs(
    table: tuple[int, int, int, int], confidence: float
) -> None:
    both, first, second, neither = table
    low, high = paired_interval(Pairs(*table), confidence)
    assert -1 <= low <= Pairs(*table).difference <= high <= 1
    assert low < high
    turned = paired_interval(Pairs(both, second, first, neither), confidence)
    assert turned == pytest.approx((-high, -low), abs=1e-12)


def test_pairs_are_counted_and_written_and_read() -> None:
    first = np.array([True, True, True, False, False])
    second = np.array([True, False, False, True, False])
    pairs = Pairs.of(first, second)
    assert pairs == Pairs(1, 2, 1, 1)
    assert Pairs.from_json(json.loads(json.dumps(pairs.to_json()))) == pairs
    with pytest.raises(ValueError, match="do not belong"):
        Pairs.from_json({**pairs.to_json(), "difference": 0.5})
    with pytest.raises(ValueError, match="do not belong"):
        Pairs.from_json({**pairs.to_json(), "more": 1})
    for bad in ({}, {**pairs.to_json(), "both": True}, {**pairs.to_json(), "both": -1}):
        with pytest.raises(ValueError, match="no pairs"):
            Pairs.from_json(bad)
    with pytest.raises(ValueError, match="equally long"):
        Pairs.of(first, second[:3])
    with pytest.raises(ValueError, match="no pairs"):
        Pairs(0, 0, 0, 0)


@pytest.mark.parametrize("accuracy", [0.3, 0.9, 0.985])
@pytest.mark.parametrize("judged", [1, 298])
def test_enough_images_are_attacked_and_no_more(judged: int, accuracy: float) -> None:
    n = images_to_attack(judged, accuracy)
    assert binom.sf(judged - 1, n, accuracy) >= 0.99
    assert n == judged or binom.sf(judged - 1, n - 1, accuracy) < 0.99


def test_the_ends_of_the_number_of_images() -> None:
    assert images_to_attack(298, 1.0) == 298
    assert images_to_attack(0, 0.5) == 0
    with pytest.raises(ValueError, match="accuracy"):
        images_to_attack(10, 0.0)


def test_many_tests_err_more_often_than_one() -> None:
    assert at_least_once(0.05, 1) == pytest.approx(0.05)
    assert at_least_once(0.05, 10) == pytest.approx(binom.sf(0, 10, 0.05))
    assert at_least_once(0.05, 0) == 0
    with pytest.raises(ValueError, match="no risk"):
        at_least_once(1.5, 2)
