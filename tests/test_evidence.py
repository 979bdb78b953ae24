"""Figures as values: JSON there and back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from device_tests.evidence import Measured, Proportion, SelfCheck, ThreatResult, TransferCell, measured_from_json
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Threat
from exporters.measured import NotMeasured

ABSENT = NotMeasured("it was not run")


@pytest.mark.parametrize("figure", [Proportion(0, 1), Proportion(21, 298), Proportion(7, 7), ABSENT])
def test_a_measured_value_survives_json(figure: Measured) -> None:
    assert measured_from_json(json.loads(json.dumps(figure.to_json()))) == figure


@pytest.mark.parametrize("fooled", [Proportion(3, 10), ABSENT])
def test_cells_results_and_checks_survive_json(fooled: Measured) -> None:
    cell = TransferCell("base", Threat.PUBLIC_BASE, "pgd", "camera-01", Perturbation(Norm.LINF, 8 / 255), fooled)
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
