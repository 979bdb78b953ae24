"""The exported package under attack: counts that can be checked by hand, and a real package's three formats."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from device_tests.attacks.pgd import PGD
from device_tests.crafting import craft
from device_tests.evidence import Proportion
from device_tests.package_judgement import FormatJudgement, PackageJudgement, judge_package
from device_tests.perturbation import Perturbation
from device_tests.threats import Source, Threat
from exporters.formats import FORMATS
from exporters.measured import NotMeasured
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from factory.cli.stages import existing_fleet
from factory.pipeline import make_candidate
from keys.errors import InputError


@dataclass(frozen=True)
class Threshold:
    """Two classes: is the first value of the image at least ``level``? ``scale`` stretches the logits."""

    level: int
    scale: float = 1.0
    name: str = "threshold"

    def logits(self, images: np.ndarray) -> np.ndarray:
        above = images[:, 0, 0, 0] * 255 - (self.level - 0.5)
        return (np.stack([-above, above], axis=1) * self.scale).astype(np.float32)


class Refusing:
    name = "refusing"

    def logits(self, images: np.ndarray) -> np.ndarray:
        raise InputError("the operator 'einsum' is not known")


class Overflowing(Threshold):
    def logits(self, images: np.ndarray) -> np.ndarray:
        return np.where(images[:, 0, 0] * 255 > 150, np.nan, super().logits(images)).astype(np.float32)


def pictures(*levels: int) -> np.ndarray:
    return np.array(levels, np.uint8).reshape(-1, 1, 1, 1)


CLEAN = pictures(90, 90, 90, 110, 110, 110)
LABELS = np.array([0, 0, 0, 1, 1, 0])
FIRST = pictures(90, 104, 120, 110, 104, 110)
SECOND = pictures(90, 90, 90, 90, 104, 110)
TORCH = Threshold(100)


def judged(
    runtime: Runtime | NotMeasured, first: int = 6, attacks: tuple[str, ...] = ("first", "second")
) -> FormatJudgement | NotMeasured:
    adversarial = {name: {"first": FIRST, "second": SECOND}[name] for name in attacks}
    result = judge_package(TORCH, {"ONNX fp32": runtime}, CLEAN, LABELS, adversarial, first={"ONNX fp32": first})
    assert result.attacks == attacks
    assert PackageJudgement.from_json(json.loads(json.dumps(result.to_json()))) == result
    return result.formats["ONNX fp32"]


def test_the_same_model_is_fooled_by_the_same_images() -> None:
    # Torch gets all but the last right; 104 and 120 fool it on the second and third image, 90 on the fourth.
    assert judged(TORCH) == FormatJudgement(
        "threshold", 6, Proportion(3, 5), Proportion(3, 5), 0, 0, Proportion(0, 6), 0.0
    )


def test_a_model_that_differs_is_counted_image_by_image() -> None:
    # Its threshold lies at 106, so 104 does not reach it: not fooled on image 1, but on image 4, as torch is not.
    result = judged(Threshold(106))
    assert isinstance(result, FormatJudgement)
    assert (result.fooled, result.torch_fooled) == (Proportion(3, 5), Proportion(3, 5))
    assert (result.torch_only, result.format_only) == (1, 1)
    assert result.differing == Proportion(2, 6)
    assert result.largest_difference == pytest.approx(6 / 20.5)


def test_one_attack_alone_and_the_first_images_alone() -> None:
    result = judged(TORCH, 3, ("second",))
    assert isinstance(result, FormatJudgement)
    assert (result.images, result.fooled, result.torch_fooled) == (3, Proportion(0, 3), Proportion(0, 3))


def test_logits_in_another_unit_fool_alike_and_are_far_apart() -> None:
    result = judged(Threshold(100, scale=3.0))
    assert isinstance(result, FormatJudgement)
    assert result.differing == Proportion(0, 6)
    assert result.largest_difference == pytest.approx(2.0)


def test_logits_that_are_not_finite_are_wrong_and_infinitely_far() -> None:
    bright = pictures(*(200 for _ in LABELS))
    result = judge_package(TORCH, {"x": Overflowing(100)}, CLEAN, LABELS, {"bright": bright}).formats["x"]
    assert isinstance(result, FormatJudgement)
    assert result.fooled == Proportion(5, 5)
    assert result.format_only == 2  # the two of class 1, which brightness does not fool in torch
    assert result.differing == Proportion(6, 6)
    assert math.isinf(result.largest_difference)
    assert FormatJudgement.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_what_cannot_be_run_is_not_measured() -> None:
    absent = NotMeasured("the package has no such file")
    assert judged(absent) == absent
    assert judged(TORCH, 0) == NotMeasured("no attacked image was to go through it")
    assert judged(Refusing()) == NotMeasured("refusing cannot run it: the operator 'einsum' is not known")


def test_a_rate_needs_images_that_are_right_when_clean() -> None:
    result = judge_package(TORCH, {"x": Threshold(1)}, CLEAN[:3], LABELS[:3], {"first": FIRST[:3]}).formats["x"]
    assert isinstance(result, FormatJudgement)
    assert result.fooled == NotMeasured("none of the clean images is classified correctly")
    assert result.torch_fooled == Proportion(2, 3)
    assert (result.torch_only, result.format_only) == (0, 0)


def test_nothing_to_judge_is_a_mistake_of_the_caller() -> None:
    for images, attacks in ((CLEAN, {}), (CLEAN[:0], {"first": FIRST[:0]}), (CLEAN, {"first": FIRST[:3]})):
        with pytest.raises(ValueError, match=r"nothing to judge|has images"):
            judge_package(TORCH, {}, images, LABELS[: len(images)], attacks)


def test_what_is_no_judgement_is_refused() -> None:
    value = judge_package(TORCH, {"x": TORCH}, CLEAN, LABELS, {"first": FIRST}).to_json()
    with pytest.raises(ValueError, match="expected the fields"):
        PackageJudgement.from_json(value | {"passed": True})
    del value["formats"]["x"]["differing"]
    with pytest.raises(ValueError, match="expected the fields"):
        PackageJudgement.from_json(value)


def test_a_real_package_in_all_its_formats(tiny_fleet: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_fleet, tmp_path / "fleet")
    with existing_fleet(out, None, True) as fleet:
        candidate = make_candidate(fleet, "device-1")
        test = fleet.splits.test.take(24)
    clean, labels = test.images.numpy(), test.labels.numpy()
    source = Source("device-1", Threat.TARGET_ITSELF, candidate.baked, "itself")
    ball = Perturbation.parse("linf:24/255")
    made = craft(source, [PGD(steps=3)], clean, labels, perturbation=ball, seed=0)
    formats: dict[str, Runtime | NotMeasured] = {
        "ONNX fp32": OnnxRuntime(candidate.package / FORMATS["onnx-fp32"].path, threads=1),
        "Core ML fp32": CoreMLEvaluator(candidate.package / FORMATS["coreml-fp32"].path),
        "Core ML fp16": CoreMLEvaluator(candidate.package / FORMATS["coreml-fp16"].path),
    }
    first = {"Core ML fp32": 8, "Core ML fp16": 8}
    result = judge_package(TorchRuntime(candidate.baked), formats, clean, labels, made.images, first=first)
    assert PackageJudgement.from_json(json.loads(json.dumps(result.to_json()))) == result
    for name, limit in (("ONNX fp32", 1e-4), ("Core ML fp32", 1e-3), ("Core ML fp16", 2e-2)):
        judged_format = result.formats[name]
        assert isinstance(judged_format, FormatJudgement)
        assert judged_format.images == first.get(name, 24)
        assert judged_format.largest_difference <= limit
    exact = result.formats["ONNX fp32"]
    assert isinstance(exact, FormatJudgement)
    assert exact.fooled == exact.torch_fooled
    assert isinstance(exact.fooled, Proportion)
    assert exact.fooled.successes > 0
    assert (exact.torch_only, exact.format_only, exact.differing.successes) == (0, 0, 0)
