"""Fleet rates, differences and trends: known cases, coverage by simulation, and what is not measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, t

from device_tests.collusion_trend import Trend, collusion_trend
from device_tests.fleet_statistics import (
    FleetDifference,
    FleetRate,
    arm_difference,
    fleet_rate,
    group_difference,
)
from device_tests.statistics import Pairs, wilson_interval
from exporters.measured import NotMeasured


def load_simulation() -> ModuleType:
    """The long simulation's own model and loops, from the script."""
    path = Path(__file__).parents[1] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulation = load_simulation()


def rate(fooled: np.ndarray, judged: np.ndarray | None = None) -> FleetRate:
    result = fleet_rate(fooled, np.ones(fooled.shape, dtype=bool) if judged is None else judged)
    assert isinstance(result, FleetRate)
    return result


def test_every_device_counts_the_same_over_its_own_images() -> None:
    judged = np.zeros((2, 200), dtype=bool)
    judged[0, :100] = True
    judged[1, :150] = True
    fooled = np.zeros((2, 200), dtype=bool)
    fooled[0, :20] = True
    fooled[1, :60] = True
    found = rate(fooled, judged)
    assert found.mean == pytest.approx((0.2 + 0.4) / 2)
    assert (found.devices, found.images) == (2, 150)
    # What was not judged changes nothing.
    assert rate(fooled | ~judged, judged) == found


def test_without_shared_images_it_is_students_interval_on_the_logit_scale() -> None:
    # Each image is fooled on exactly one of four devices: the images' part is below zero, only the devices are left.
    counts = np.array([30, 90, 120, 160])
    fooled = np.repeat(np.eye(4, dtype=bool), counts, axis=1)
    found = rate(fooled)
    rates = counts / 400
    half = t.ppf(0.975, 3) * rates.std(ddof=1) / 2 / (0.25 * 0.75)
    assert found.low == pytest.approx(expit(np.log(1 / 3) - half))
    assert found.high == pytest.approx(expit(np.log(1 / 3) + half))


def test_devices_that_agree_on_every_image_are_one_sample_of_images() -> None:
    one = np.arange(300) < 60
    found = rate(np.tile(one, (5, 1)))
    half = 1.959964 * np.sqrt(1 / (299 * 0.2 * 0.8))
    assert found.low == pytest.approx(expit(np.log(0.25) - half), rel=1e-6)
    assert found.high == pytest.approx(expit(np.log(0.25) + half), rel=1e-6)


def test_equal_rates_by_chance_keep_a_width() -> None:
    fooled = np.repeat(np.eye(3, dtype=bool), 100, axis=1)
    found = rate(fooled)
    assert found.mean == pytest.approx(1 / 3)
    assert found.high - found.low > 0.02


def test_no_image_or_every_image_fooled_counts_every_image_once() -> None:
    none = np.zeros((10, 300), dtype=bool)
    assert rate(none).mean == 0
    assert (rate(none).low, rate(none).high) == wilson_interval(0, 300)
    assert (rate(~none).low, rate(~none).high) == wilson_interval(300, 300)


def test_what_cannot_be_measured() -> None:
    one = fleet_rate(np.ones((1, 300), dtype=bool), np.ones((1, 300), dtype=bool))
    assert isinstance(one, NotMeasured)
    assert one.reason.startswith("the fleet has 1 device;")
    judged = np.ones((3, 300), dtype=bool)
    judged[1, 29:] = False
    few = fleet_rate(judged, judged)
    assert isinstance(few, NotMeasured)
    assert "judges 29 images" in few.reason
    group = group_difference(judged[:1], judged[:1], judged[::2], judged[::2])
    assert isinstance(group, NotMeasured)
    assert "the first group has 1 device" in group.reason
    assert isinstance(arm_difference(judged, judged, judged), NotMeasured)


def test_shapes_that_do_not_fit_are_refused() -> None:
    judged = np.ones((3, 300), dtype=bool)
    with pytest.raises(ValueError, match="outcomes"):
        fleet_rate(judged[:2], judged)
    with pytest.raises(ValueError, match="device × image"):
        fleet_rate(judged[0], judged[0])
    with pytest.raises(ValueError, match="different images"):
        group_difference(judged, judged, judged[:, :200], judged[:, :200])


def test_rates_and_differences_are_written_and_read() -> None:
    fooled, judged = sample(np.random.default_rng(0), 0.2)
    found = rate(fooled, judged)
    assert FleetRate.from_json(json.loads(json.dumps(found.to_json()))) == found
    difference = arm_difference(fooled, ~fooled, judged)
    assert isinstance(difference, FleetDifference)
    assert FleetDifference.from_json(json.loads(json.dumps(difference.to_json()))) == difference
    for kind, value in ((FleetRate, found), (FleetDifference, difference)):
        with pytest.raises(ValueError, match="expected the fields"):
            kind.from_json({**value.to_json(), "more": 1})
    with pytest.raises(ValueError, match="no rate"):
        FleetRate.from_json({**found.to_json(), "mean": 2.0})
    with pytest.raises(ValueError, match="no difference"):
        FleetDifference(0.5, 0.6, 0.7, (3, 3), 300)


def sample(
    rng: np.random.Generator, share: float, devices: int = 4, images: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    judged = rng.random((devices, images)) < 0.9
    return (rng.random((devices, images)) < share) & judged, judged


def test_two_arms_are_the_opposite_of_each_other_exchanged() -> None:
    rng = np.random.default_rng(1)
    first, judged = sample(rng, 0.3)
    second = (rng.random(judged.shape) < 0.1) & judged
    there, back = arm_difference(first, second, judged), arm_difference(second, first, judged)
    assert isinstance(there, FleetDifference)
    assert isinstance(back, FleetDifference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.difference == pytest.approx(rate(first, judged).mean - rate(second, judged).mean)
    assert there.low > 0


def test_equal_arms_differ_by_nothing_with_a_width() -> None:
    first, judged = sample(np.random.default_rng(2), 0.3)
    same = arm_difference(first, first, judged)
    assert isinstance(same, FleetDifference)
    assert same.difference == 0
    assert -0.03 < same.low < -0.01
    assert same.high == pytest.approx(-same.low)


def test_devices_that_agree_are_compared_as_pairs_of_images() -> None:
    # Every device answers alike: what is left is one paired comparison, close to Newcombe's.
    first, second = np.arange(1000) < 300, np.arange(1000) % 5 == 0
    judged = np.ones((6, 1000), dtype=bool)
    found = arm_difference(np.tile(first, (6, 1)), np.tile(second, (6, 1)), judged)
    assert isinstance(found, FleetDifference)
    assert (found.low, found.high) == pytest.approx(Pairs.of(first, second).interval, abs=0.003)


def test_shared_images_make_a_difference_of_groups_narrower() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 3, 400)

    def group(images: np.ndarray) -> np.ndarray:
        return rng.random((6, len(images))) < expit(images - 1)

    judged = np.ones((6, 400), dtype=bool)
    first, second = group(hard), group(hard)
    shared = group_difference(first, judged, second, judged)
    shuffled = group_difference(first, judged, second[:, rng.permutation(400)], judged)
    assert isinstance(shared, FleetDifference)
    assert isinstance(shuffled, FleetDifference)
    assert shared.difference == pytest.approx(shuffled.difference)
    assert shared.high - shared.low < 0.7 * (shuffled.high - shuffled.low)


REPLICATIONS = 400
ALLOWED = (binom.ppf(0.0005, REPLICATIONS, 0.93) / REPLICATIONS, binom.ppf(0.9995, REPLICATIONS, 0.978) / REPLICATIONS)
"""What a coverage between 93 and 97.8 % gives in this many replications, but for one time in two thousand a side."""


@pytest.mark.parametrize("devices", [2, 3, 5, 10, 12])
@pytest.mark.parametrize(("share", "device", "image"), [(0.02, 0.15, 2.0), (0.2, 0.0, 2.0), (0.5, 0.4, 0.0)])
def test_the_interval_of_a_rate_covers_it(devices: int, share: float, device: float, image: float) -> None:
    population = simulation.Population(share, device, image)
    rng = np.random.default_rng([devices, int(100 * share)])
    found = simulation.rate_coverage(population, devices, 300, replications=REPLICATIONS, rng=rng)
    assert ALLOWED[0] <= found.covered <= ALLOWED[1]


@pytest.mark.parametrize("devices", [(3, 3), (10, 3), (10, 10)])
def test_the_interval_of_a_difference_of_groups_covers_it(devices: tuple[int, int]) -> None:
    populations = simulation.Population(0.3, 0.15, 2.0), simulation.Population(0.1, 0.15, 2.0)
    rng = np.random.default_rng(devices)
    found = simulation.group_coverage(*populations, devices, 300, replications=REPLICATIONS, rng=rng)
    assert ALLOWED[0] <= found.covered <= ALLOWED[1]


@pytest.mark.parametrize("devices", [3, 10])
def test_the_interval_of_a_difference_of_arms_covers_it(devices: int) -> None:
    populations = simulation.Population(0.1, 0.15, 2.0), simulation.Population(0.05, 0.15, 2.0)
    rng = np.random.default_rng(devices)
    found = simulation.arm_coverage(*populations, devices, 300, replications=REPLICATIONS, rng=rng)
    assert ALLOWED[0] <= found.covered <= ALLOWED[1]


def test_a_plain_bootstrap_over_three_uneven_devices_covers_too_little() -> None:
    population = simulation.Population(0.2, 0.4, 1.0)
    found = simulation.bootstrap_coverage(population, 3, 300, replications=300, rng=np.random.default_rng(0), draws=100)
    assert found.covered < 0.92


K = tuple(range(1, 9))


def colluding(truth: np.ndarray, devices: int = 6, images: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes with these mean rates; an image that a weaker attack fools is fooled by a stronger one more often."""
    rng = np.random.default_rng(7)
    shared = rng.random((devices, images))
    own = rng.random((len(truth), devices, images))
    order = np.where(rng.random(own.shape) < 0.8, shared, own)
    return order < truth[:, None, None], np.ones((devices, images), dtype=bool)


def trend_of(truth: np.ndarray, **changes: object) -> Trend:
    found = collusion_trend(K, *colluding(truth), **{"draws": 60, "seed": 1, **changes})  # type: ignore[arg-type]
    assert isinstance(found, Trend)
    return found


def test_a_line_is_found_and_followed() -> None:
    found = trend_of(0.1 + 0.05 * np.array(K))
    best = found.curves[0]
    assert best.model == "linear"
    assert best.a == pytest.approx(0.1, abs=0.03)
    assert best.b == pytest.approx(0.05, abs=0.006)
    at_16 = found.predictions[0]
    assert at_16.k == 16
    assert at_16.low <= 0.9 <= at_16.high
    assert found.predictions[-1].value == 1


def test_saturation_is_found_with_its_level() -> None:
    found = trend_of(0.3 * (1 - np.exp(-0.6 * np.array(K))))
    best = found.curves[0]
    assert best.model == "saturating"
    assert best.a == pytest.approx(0.3, abs=0.03)
    assert best.b == pytest.approx(0.6, abs=0.15)
    far = found.predictions[-1]
    assert far.k == 10_000
    assert far.value == pytest.approx(0.3, abs=0.03)
    assert far.low <= 0.3 <= far.high
    # The other curves say something else entirely, and the caveat says so.
    assert max(far.by_model) > 0.9
    assert "1,250 times as many, and nothing was measured there" in found.caveat


def test_a_logistic_curve_is_found() -> None:
    found = trend_of(expit(-2.5 + 1.5 * np.log(np.array(K))))
    assert found.curves[0].model == "logistic"
    assert found.curves[0].a == pytest.approx(-2.5, abs=0.3)
    assert found.curves[0].b == pytest.approx(1.5, abs=0.2)


def test_the_trend_repeats_and_is_written_and_read() -> None:
    truth = 0.1 + 0.05 * np.array(K)
    found = trend_of(truth)
    assert trend_of(truth) == found
    assert trend_of(truth, seed=2) != found
    assert Trend.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ValueError, match="expected the fields"):
        Trend.from_json({**found.to_json(), "more": 1})


def test_shares_over_several_coalitions_are_accepted() -> None:
    fooled, judged = colluding(0.1 + 0.05 * np.array(K))
    averaged = (fooled.astype(float) + fooled[:, :, ::-1]) / 2
    found = collusion_trend(K, averaged, judged, draws=20)
    assert isinstance(found, Trend)
    assert found.rates == pytest.approx(tuple(fooled.mean(axis=(1, 2))))


def test_no_image_fooled_by_any_coalition_is_a_flat_line_at_zero() -> None:
    found = collusion_trend(K, np.zeros((8, 4, 300), dtype=bool), np.ones((4, 300), dtype=bool), draws=20)
    assert isinstance(found, Trend)
    assert found.rates == (0,) * 8
    assert found.predictions[-1].value < 0.02


def test_trends_that_cannot_be_measured() -> None:
    fooled, judged = colluding(0.1 + 0.05 * np.array(K))
    four = collusion_trend(K[:4], fooled[:4], judged)
    two = collusion_trend(K, fooled[:, :2], judged[:2])
    few = collusion_trend(K, fooled[:, :, :20], judged[:, :20])
    for result, words in ((four, "5 numbers"), (two, "three targets"), (few, "20 images")):
        assert isinstance(result, NotMeasured)
        assert words in result.reason
    with pytest.raises(ValueError, match="different numbers"):
        collusion_trend((1, 1, 2, 3, 4, 5, 6, 7), fooled, judged)
    with pytest.raises(ValueError, match="expected outcomes"):
        collusion_trend(K, fooled[:5], judged)
