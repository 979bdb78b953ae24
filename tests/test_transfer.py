"""Transfer: the judgement of a target image by image, and what is not believed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.crafting import AdversarialSet
from device_tests.evidence import Measured, Proportion, SelfCheck
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Threat
from device_tests.transfer import judge
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime


class Bands(nn.Module):
    """Four classes: in which quarter of the grey scale the image's mean lies."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        centers = torch.tensor([32.0, 96.0, 160.0, 224.0]) / 255
        return -((images.mean(dim=(1, 2, 3))[:, None] - centers) ** 2)


TARGET = TorchRuntime(Bands())
LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3])
CLEAN = np.repeat(np.array([40, 104, 168, 232, 24, 88, 152, 216], np.uint8), 4).reshape(8, 1, 2, 2)
WIDE = Perturbation(Norm.LINF, 64 / 255)


def moved(*fooled: int) -> np.ndarray:
    """The clean images, those with these indices moved by 64 levels into another class."""
    images = CLEAN.copy()
    for index in fooled:
        images[index] = images[index] + 64 if images[index].max() < 128 else images[index] - 64
    return images


def made(source: str, threat: Threat, **attacks: np.ndarray) -> AdversarialSet:
    return AdversarialSet(source, threat, WIDE, attacks)


def check(source: str, attack: str = "pgd", success: Measured | None = None) -> SelfCheck:
    strong = Proportion(9, 10)
    return SelfCheck(source, attack, success or strong, "APGD-CE", strong, success is None, 0.05)


FLEET = [
    made("base", Threat.PUBLIC_BASE, pgd=moved(0), mi=moved(0, 1)),
    made("guessed-1", Threat.GUESSED_KEY, pgd=moved(2)),
    made("camera-02", Threat.SIBLING_DEVICE, pgd=moved(1)),
    made("camera-03", Threat.SIBLING_DEVICE, pgd=moved(1, 3)),
    made("camera-01", Threat.SIBLING_DEVICE, pgd=moved(*range(8))),
    made("unkeyed", Threat.UNKEYED_CONTROL, pgd=moved(4, 5, 6)),
]
CHECKS = [check(adversarial.source, attack) for adversarial in FLEET for attack in adversarial.images]


def test_the_worst_case_is_taken_image_by_image_over_the_threats_that_count() -> None:
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, FLEET, CHECKS)
    assert judged.worst_case == Proportion(4, 8)
    assert isinstance(judged.worst_fooled, np.ndarray)
    assert judged.worst_fooled.tolist() == [True] * 4 + [False] * 4
    assert {result.threat: result.fooled for result in judged.threats} == {
        Threat.PUBLIC_BASE: Proportion(2, 8),
        Threat.GUESSED_KEY: Proportion(1, 8),
        Threat.SIBLING_DEVICE: Proportion(2, 8),
        Threat.UNKEYED_CONTROL: Proportion(3, 8),
        Threat.TARGET_ITSELF: Proportion(8, 8),
    }
    cells = {(cell.source, cell.attack): cell for cell in judged.cells}
    assert cells["base", "mi"].fooled == Proportion(2, 8)
    assert cells["camera-01", "pgd"].threat is Threat.TARGET_ITSELF
    assert cells["camera-02", "pgd"].threat is Threat.SIBLING_DEVICE
    assert len(cells) == 7


def test_only_images_that_are_right_when_clean_count() -> None:
    labels = LABELS.copy()
    labels[[0, 7]] = [2, 0]
    judged = judge(TARGET, "camera-01", CLEAN, labels, FLEET, CHECKS)
    assert judged.correct.tolist() == [False] + [True] * 6 + [False]
    assert judged.worst_case == Proportion(3, 6)
    assert judged.fooled("base", "mi").tolist() == [True, False, False, False, False, False]
    assert judged.wrong("base", "mi")[0]


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ([check("camera-02", success=Proportion(4, 10))], "too weak"),
        ([check("camera-02", success=NotMeasured("it was not run"))], "it was not run"),
        ([], "not self-checked"),
    ],
)
def test_a_source_that_is_not_believed_leaves_the_worst_case_unmeasured(replaced: list[SelfCheck], said: str) -> None:
    checks = [one for one in CHECKS if one.source != "camera-02"] + replaced
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, FLEET, checks)
    figures = {cell.source: cell.fooled for cell in judged.cells}
    figures |= {result.threat.code: result.fooled for result in judged.threats}
    for unmeasured in (figures["camera-02"], figures["T2"], judged.worst_case):
        assert isinstance(unmeasured, NotMeasured)
        assert said in unmeasured.reason
        assert "camera-02" in unmeasured.reason
    assert figures["camera-03"] == Proportion(2, 8)
    assert figures["T0"] == Proportion(2, 8)
    # What was seen stays accessible, only its rate is not believed.
    assert judged.fooled("camera-02", "pgd").sum() == 1


def test_one_strong_attack_is_enough_to_believe_a_source() -> None:
    checks = [replace(one, passed=one.attack == "pgd") for one in CHECKS]
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, FLEET, checks)
    assert judged.worst_case == Proportion(4, 8)
    assert {cell.attack: cell.fooled for cell in judged.cells if cell.source == "base"} == {
        "pgd": Proportion(1, 8),
        "mi": Proportion(2, 8),
    }


def test_a_control_or_the_target_itself_cannot_spoil_the_worst_case() -> None:
    checks = [one for one in CHECKS if one.source not in ("unkeyed", "camera-01")]
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, FLEET, checks)
    assert judged.worst_case == Proportion(4, 8)


def test_a_required_threat_that_was_not_run_is_not_measured() -> None:
    alone = [adversarial for adversarial in FLEET if adversarial.threat is not Threat.SIBLING_DEVICE]
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, alone, CHECKS)
    assert judged.worst_case == NotMeasured("no attack of threat T2 was run")
    two = (Threat.PUBLIC_BASE, Threat.GUESSED_KEY)
    assert judge(TARGET, "camera-01", CLEAN, LABELS, alone, CHECKS, required=two).worst_case == Proportion(3, 8)


def test_nothing_run_or_nothing_right_is_not_measured() -> None:
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, [], [], required=())
    assert isinstance(judged.worst_case, NotMeasured)
    judged = judge(TARGET, "camera-01", CLEAN, (LABELS + 1) % 4, FLEET, CHECKS)
    assert isinstance(judged.worst_case, NotMeasured)
    assert "none of the clean images" in judged.worst_case.reason


def test_sets_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="not made from these images"):
        judge(TARGET, "camera-01", 255 - CLEAN, LABELS, FLEET, CHECKS)
    with pytest.raises(ValueError, match="has uint8 images"):
        judge(TARGET, "camera-01", CLEAN[:5], LABELS[:5], FLEET, CHECKS)
    with pytest.raises(ValueError, match="twice"):
        judge(TARGET, "camera-01", CLEAN, LABELS, [FLEET[0], FLEET[0]], CHECKS)
    with pytest.raises(ValueError, match="different perturbations"):
        judge(
            TARGET,
            "camera-01",
            CLEAN,
            LABELS,
            [FLEET[0], replace(FLEET[1], perturbation=Perturbation(Norm.LINF, 0.5))],
            CHECKS,
        )
    with pytest.raises(ValueError, match="no attack was run on base"):
        judge(TARGET, "camera-01", CLEAN, LABELS, [made("base", Threat.PUBLIC_BASE)], CHECKS)


def test_an_attack_that_broke_leaves_its_threat_and_the_worst_case_unmeasured() -> None:
    broken = replace(FLEET[0], failures={"apgd": "apgd on base failed: RuntimeError: out of range"})
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, [broken, *FLEET[1:]], CHECKS)
    cells = {(cell.source, cell.attack): cell.fooled for cell in judged.cells}
    assert cells["base", "apgd"] == NotMeasured("apgd on base failed: RuntimeError: out of range")
    assert cells["guessed-1", "pgd"] == Proportion(1, 8)
    assert isinstance(judged.worst_case, NotMeasured)
    assert "out of range" in judged.worst_case.reason


def test_queries_pixels_and_patches_are_believed_without_a_self_check() -> None:
    asked = replace(made("camera-01", Threat.QUERIES, square=moved(0, 1, 2)), differentiable=False)
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, [asked], [], required=())
    assert [(cell.threat, cell.fooled) for cell in judged.cells] == [(Threat.QUERIES, Proportion(3, 8))]
    assert isinstance(judged.worst_case, NotMeasured)  # queries are stated, never counted
    painted = AdversarialSet("base", Threat.PUBLIC_BASE, Perturbation(Norm.L0, 4), {"rs": moved(5)})
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, [painted], [], required=())
    assert judged.worst_case == Proportion(1, 8)


def test_answers_alone_never_stand_for_a_required_threat() -> None:
    """A file that gives no gradients is asked, by a weak attack that nothing vouches for."""
    idle = AdversarialSet("own.file", Threat.PUBLIC_BASE, WIDE, {"square": CLEAN}, differentiable=False)
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, [idle], [], required=(Threat.PUBLIC_BASE,))
    assert judged.worst_case == NotMeasured("no attack of threat T0 had gradients")
    beside = [idle, made("base", Threat.PUBLIC_BASE, pgd=moved(0))]
    judged = judge(TARGET, "camera-01", CLEAN, LABELS, beside, [check("base")], required=(Threat.PUBLIC_BASE,))
    assert judged.worst_case == Proportion(1, 8)
