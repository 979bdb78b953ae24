"""Figures as values: JSON there and back, and what is refused; 8-bit conversion and its ball."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests.evidence import Measured, Proportion, SelfCheck, ThreatResult, TransferCell, measured_from_json
from device_tests.images import from_8bit, reachable_levels, to_8bit
from device_tests.threats import Threat
from exporters.measured import NotMeasured
from keys.errors import InputError

ABSENT = NotMeasured("it was not run")


@pytest.mark.parametrize("figure", [Proportion(0, 1), Proportion(21, 298), Proportion(7, 7), ABSENT])
def test_a_measured_value_survives_json(figure: Measured) -> None:
    assert measured_from_json(json.loads(json.dumps(figure.to_json()))) == figure


@pytest.mark.parametrize("fooled", [Proportion(3, 10), ABSENT])
def test_cells_results_and_checks_survive_json(fooled: Measured) -> None:
    cell = TransferCell("base", Threat.PUBLIC_BASE, "pgd", "camera-01", 8 / 255, fooled)
    result = ThreatResult(Threat.SIBLING_DEVICE, "camera-01", ("camera-02", "camera-03"), fooled)
    check = SelfCheck("base", "pgd", fooled, "APGD-CE", Proportion(9, 10), False, 0.05)
    for value in (cell, result, check):
        assert type(value).from_json(json.loads(json.dumps(value.to_json()))) == value


def test_a_proportion_carries_its_interval() -> None:
    value = Proportion(21, 298).to_json()
    assert value["interval"] == pytest.approx([0.0466, 0.1053], abs=5e-5)
    assert value["value"] == 21 / 298


@pytest.mark.parametrize(
    "value",
    [
        {"successes": 1, "n": 2},
        {"successes": 1, "n": 2, "value": 0.4, "interval": [0, 1]},
        {"successes": 3, "n": 2, "value": 1.5, "interval": [0, 1]},
        {"successes": 1.0, "n": 2, "value": 0.5, "interval": [0, 1]},
        {"successes": 1, "n": 2, "value": 0.5, "interval": [0, 1], "passed": True},
        {"not_measured": 3},
        {"not_measured": "x", "n": 2},
    ],
)
def test_what_is_no_figure_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        measured_from_json(value)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_there_is_no_proportion_of_nothing(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        Proportion(successes, n)


def test_a_self_check_cannot_pass_unmeasured() -> None:
    with pytest.raises(ValueError, match="without being measured"):
        SelfCheck("base", "pgd", ABSENT, "APGD-CE", Proportion(1, 1), True, 0.05)


def test_threat_codes_are_unique_and_an_unknown_one_is_refused() -> None:
    assert len({threat.code for threat in Threat}) == len(list(Threat))
    with pytest.raises(ValueError, match="T9"):
        Threat.from_code("T9")


def test_a_sibling_is_a_threat_to_others_and_the_ceiling_for_itself() -> None:
    assert Threat.SIBLING_DEVICE.on("camera-01", "camera-02") is Threat.SIBLING_DEVICE
    assert Threat.SIBLING_DEVICE.on("camera-01", "camera-01") is Threat.TARGET_ITSELF
    assert not Threat.TARGET_ITSELF.in_rule
    assert not Threat.UNKEYED_CONTROL.in_rule


LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)


def test_every_level_survives_and_torch_computes_the_same_floats() -> None:
    floats = from_8bit(LEVELS)
    assert np.array_equal(to_8bit(floats, LEVELS, 8 / 255), LEVELS)
    assert np.array_equal(floats, (torch.from_numpy(LEVELS).to(torch.float32) / 255).numpy())


@pytest.mark.parametrize("levels", range(1, 256))
def test_a_whole_radius_is_reached_in_full(levels: int) -> None:
    assert reachable_levels(levels / 255) == levels
    assert reachable_levels(float(np.float32(levels / 255))) == levels
    # Rounding alone, before anything is clipped to the ball, stays inside it.
    edge = np.clip(from_8bit(LEVELS) + np.float32(levels / 255), 0, 1)
    free = to_8bit(edge, LEVELS, 1.0)
    assert (free.astype(int) - LEVELS).max() == levels
    assert np.array_equal(free, to_8bit(edge, LEVELS, levels / 255))


@given(st.floats(1 / 255, 1.0), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_any_candidate_is_brought_inside_any_ball(epsilon: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    clean = generator.integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    candidate = generator.uniform(-0.5, 1.5, clean.shape).astype(np.float32)
    moved = np.abs(to_8bit(candidate, clean, epsilon).astype(int) - clean)
    assert (moved / 255 <= epsilon + 1e-8).all()


@pytest.mark.parametrize("epsilon", [0.0, 0.5 / 255, -0.1, 1.5, float("nan")])
def test_a_radius_without_a_level_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match="1/255"):
        reachable_levels(epsilon)


def test_values_that_are_not_finite_or_not_8bit_are_refused() -> None:
    broken = from_8bit(LEVELS)
    broken[0, 0, 3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        to_8bit(broken, LEVELS, 8 / 255)
    with pytest.raises(InputError, match="8-bit"):
        from_8bit(LEVELS.astype(np.float32))
