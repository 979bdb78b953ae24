"""The release rule's truth table: every condition alone rejects, and what is not measured never passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from device_tests.evidence import Measured, Proportion
from device_tests.release_rule import Decision, ParityVerdict, QuantisedFigures, ReleaseRule, decide
from exporters.measured import NotMeasured
from keys.errors import InputError

RULE = ReleaseRule(p0=0.05, p1=0.10, alpha=0.05, beta=0.05)
ABSENT = NotMeasured("it was not run")


@dataclass(frozen=True)
class Verdict:
    """What the rule reads of a parity measurement."""

    passed: bool


def images(n: int, *fooled: int) -> np.ndarray:
    result = np.zeros(n, dtype=bool)
    result[list(fooled)] = True
    return result


BASE = Proportion(930, 1000)
ACCURACIES: list[tuple[Measured, bool]] = [
    (Proportion(935, 1000), True),
    (Proportion(900, 1000), True),
    (Proportion(899, 1000), False),
    (ABSENT, False),
]
PARITIES: list[tuple[dict[str, ParityVerdict | NotMeasured], bool]] = [
    ({"onnxruntime": Verdict(True), "coreml fp16": Verdict(True)}, True),
    ({"onnxruntime": Verdict(True), "coreml fp16": Verdict(False)}, False),
    ({"onnxruntime": Verdict(True), "coreml fp16": ABSENT}, False),
    ({}, False),
]
WORST: list[tuple[np.ndarray | NotMeasured, bool]] = [
    (images(298, *range(21)), True),
    (images(298, *range(22)), False),
    (images(297), False),
    (images(0), False),
    (ABSENT, False),
]


def decided(
    device: Measured = BASE,
    parities: dict[str, ParityVerdict | NotMeasured] = PARITIES[0][0],
    worst: np.ndarray | NotMeasured = WORST[0][0],
    base: Measured = BASE,
    rule: ReleaseRule = RULE,
) -> Decision:
    return decide(rule, base_accuracy=base, device_accuracy=device, parities=parities, worst_fooled=worst)


@pytest.mark.parametrize(
    ("accuracy", "parity", "worst"), list(product(ACCURACIES, PARITIES, WORST)), ids=lambda case: str(case[1])
)
def test_released_only_if_every_condition_is_measured_and_met(
    accuracy: tuple[Measured, bool],
    parity: tuple[dict[str, ParityVerdict | NotMeasured], bool],
    worst: tuple[np.ndarray | NotMeasured, bool],
) -> None:
    decision = decided(accuracy[0], parity[0], worst[0])
    expected = [accuracy[1], parity[1], worst[1]]
    assert decision.released is all(expected)
    assert len(decision.reasons) == expected.count(False)
    assert all(reason.endswith(".") for reason in decision.reasons)
    json.dumps(decision.to_json())


def test_an_unmeasured_base_rejects() -> None:
    decision = decided(base=ABSENT)
    assert decision.reasons == ("The clean accuracy of the base was not measured: it was not run.",)


def test_the_sentences_carry_the_figures() -> None:
    decision = decided(Proportion(880, 1000), {"onnxruntime": Verdict(False)}, images(298, *range(40)))
    accuracy, parity, transfer = decision.reasons
    assert "0.8800 is 0.0500 below the base's 0.9300 on the same 1000 images; at most 0.03" in accuracy
    assert parity.startswith("onnxruntime differs")
    assert "40 of 298 images are fooled; at most 21" in transfer
    assert decision.to_json()["test"]["plan"]["n"] == 298


def test_too_few_images_say_how_many_are_needed() -> None:
    decision = decided(worst=images(250))
    assert decision.test is None
    assert "needs 298 images" in decision.reasons[0]
    assert "there were 250" in decision.reasons[0]


def test_all_images_are_used_where_a_limit_keeps_both_risks() -> None:
    decision = decided(worst=images(2000, *range(100)))
    assert decision.test is not None
    assert decision.test.plan.n == 2000
    assert decision.test.fooled == 100
    assert decision.released


def test_images_beyond_the_plan_are_left_out_of_the_test() -> None:
    # No limit keeps both risks on 305 images; the first 300 are used with c = 21.
    late = decided(worst=images(305, *range(21), 301, 302, 303))
    early = decided(worst=images(305, *range(22)))
    assert late.test is not None
    assert (late.test.plan.n, late.test.fooled) == (300, 21)
    assert late.released
    assert not early.released


def test_the_rule_neither_rejects_all_nor_accepts_all() -> None:
    # The promise itself, by simulation: at p0 at most 5 % rejected, at p1 at most 5 % released.
    generator = np.random.default_rng(0)
    released = {
        rate: np.mean([decided(worst=generator.random(298) < rate).released for _ in range(200)])
        for rate in (0.02, 0.05, 0.10, 0.15)
    }
    assert released[0.02] > 0.99
    assert released[0.05] > 0.90
    assert released[0.10] < 0.10
    assert released[0.15] < 0.01


def test_a_rule_that_states_no_test_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="p0 < p1"):
        ReleaseRule(p0=0.1, p1=0.05, alpha=0.05, beta=0.05)
    with pytest.raises(InputError, match="accuracy drop"):
        ReleaseRule(p0=0.05, p1=0.1, alpha=0.05, beta=0.05, allowed_accuracy_drop=3)


@pytest.mark.parametrize(("accuracy", "worst"), list(product(ACCURACIES, WORST)), ids=lambda case: str(case[1]))
def test_a_quantised_format_has_to_meet_the_rule_by_itself(
    accuracy: tuple[Measured, bool], worst: tuple[np.ndarray | NotMeasured, bool]
) -> None:
    decision = decide(
        RULE, base_accuracy=BASE, device_accuracy=BASE, parities=PARITIES[0][0], worst_fooled=WORST[0][0],
        quantised={"ONNX int8": QuantisedFigures(BASE, accuracy[0], worst[0])},
    )  # fmt: skip
    assert decision.released is (accuracy[1] and worst[1])
    assert all(reason.startswith("ONNX int8: ") for reason in decision.reasons)
    names = [condition.name for condition in decision.conditions]
    assert names[-2:] == ["accuracy ONNX int8", "transfer ONNX int8"]
