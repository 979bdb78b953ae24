"""From a model to an unsigned package: written once, whole, and made anew when it is not what it should be."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.accuracy import predict
from exporters.golden import read_golden
from exporters.manifest import Manifest
from exporters.measured import NotMeasured
from exporters.package import digest_folder, inspect_package
from exporters.parity import Parity
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.folding import bake
from factory.packaging import TOOLS, Identity, _existing, export_package, export_plan, parity_of, tool_versions
from factory.progress import Progress
from factory.settings import ExportSettings

CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)
IDENTITY = Identity("camera-1", 3, "00112233445566ff", "a" * 64, {"rank": 4}, CREATED)


@pytest.fixture(scope="module")
def baked(tiny_base: Base) -> nn.Module:
    return bake(ImageClassifier(tiny_base.network, tiny_base.architecture.mean, tiny_base.architecture.std))


@pytest.fixture(scope="module")
def package(baked: nn.Module, tiny_base: Base, tiny_splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device") / "package"
    images = tiny_splits.validation.images.numpy()
    export_package(baked, tiny_base, IDENTITY, images, folder, Progress(quiet=True))
    return folder


def test_a_package_says_what_it_is(package: Path, tiny_base: Base) -> None:
    manifest, signed = inspect_package(package)
    assert not signed
    assert (manifest.device_id, manifest.generation, manifest.fleet_id) == ("camera-1", 3, "00112233445566ff")
    assert (manifest.adapter_digest, manifest.base_digest) == ("a" * 64, tiny_base.digest)
    assert dict(manifest.recipe) == {"rank": 4}
    assert manifest.labels == tiny_base.architecture.labels
    assert manifest.input == tiny_base.architecture.contract
    assert dict(manifest.files) == digest_folder(package)
    assert dict(manifest.tools) == tool_versions()
    assert {*TOOLS, "python"} == set(manifest.tools)
    assert not manifest.evidence


def test_the_golden_logits_are_torchs_on_the_first_images(
    package: Path, baked: nn.Module, tiny_base: Base, tiny_splits: Splits
) -> None:
    golden = read_golden((package / "golden.npz").read_bytes(), tiny_base.architecture.contract, 10)
    images = tiny_splits.validation.images.numpy()[: len(golden.images)]
    assert len(golden.images) == 8
    assert np.array_equal(golden.images, images)
    assert np.array_equal(golden.logits, TorchRuntime(baked).logits(images.astype(np.float32) / 255))


def test_the_onnx_file_answers_as_the_model(package: Path, baked: nn.Module, tiny_splits: Splits) -> None:
    images = tiny_splits.test.images.numpy()
    classes = predict(OnnxRuntime(package / "model.onnx"), images)
    assert np.array_equal(classes, predict(TorchRuntime(baked), images))


def test_a_whole_package_of_the_same_model_is_kept(
    package: Path, baked: nn.Module, tiny_base: Base, tiny_splits: Splits
) -> None:
    before = (package / "manifest.json").read_bytes()
    progress = Progress(quiet=True)
    manifest = export_package(baked, tiny_base, IDENTITY, tiny_splits.validation.images.numpy(), package, progress)
    assert isinstance(manifest, Manifest)
    assert progress.seconds == {}
    assert (package / "manifest.json").read_bytes() == before


def test_another_identity_or_a_damaged_package_is_made_anew(package: Path, tiny_base: Base, tmp_path: Path) -> None:
    """Asks only whether it would be kept: making it is tested above."""
    plan = export_plan(tiny_base, ExportSettings(), np.zeros((1, 1, 28, 28), np.uint8))
    assert _existing(package, IDENTITY, tiny_base, plan) is not None
    others: list[dict[str, Any]] = [
        {"device_id": "other"}, {"generation": 4}, {"fleet_id": "f" * 16}, {"adapter_digest": "b" * 64},
        {"created": CREATED + timedelta(seconds=1)},
    ]  # fmt: skip
    for change in others:
        assert _existing(package, dataclasses.replace(IDENTITY, **change), tiny_base, plan) is None
    assert _existing(package, IDENTITY, tiny_base, dataclasses.replace(plan, opset=21)) is None
    assert _existing(tmp_path / "none", IDENTITY, tiny_base, plan) is None
    copy = shutil.copytree(package, tmp_path / "copy")
    weights = copy / "model-fp32.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert _existing(copy, IDENTITY, tiny_base, plan) is None
    shutil.copyfile(package / weights.relative_to(copy), weights)
    assert _existing(copy, IDENTITY, tiny_base, plan) is not None
    (copy / "model.onnx").unlink()
    assert _existing(copy, IDENTITY, tiny_base, plan) is None


def test_parity_is_measured_for_every_format_and_once(
    package: Path, baked: nn.Module, tiny_splits: Splits, tmp_path: Path
) -> None:
    images = tiny_splits.validation.images.numpy()[:20]
    first, again, more = Progress(quiet=True), Progress(quiet=True), Progress(quiet=True)
    record = tmp_path / "parity.json"
    measured = parity_of(baked, package, images, record, first)
    assert list(measured) == ["ONNX fp32", "Core ML fp32", "Core ML fp16"]
    for parity in measured.values():
        assert isinstance(parity, Parity)
        assert parity.passed
        assert parity.n == 20
    assert parity_of(baked, package, images, record, again) == measured
    assert (list(first.seconds), again.seconds) == (["parity camera-1"], {})
    # Other images are another measurement.
    parity_of(baked, package, images[:10], record, more)
    assert list(more.seconds) == ["parity camera-1"]
    assert json.loads(record.read_text())["value"]["ONNX fp32"]["n"] == 10


def test_an_overflow_in_float16_is_named(tiny_base: Base, tiny_splits: Splits, tmp_path: Path) -> None:
    """Weights that float16 holds, and activations that it does not: float32 answers, float16 is not measured."""
    module = bake(ImageClassifier(tiny_base.network, tiny_base.architecture.mean, tiny_base.architecture.std))
    with torch.no_grad():
        module.get_parameter("blocks.0.mlp.fc1.weight").fill_(3e4)
        module.get_parameter("blocks.0.mlp.fc1.bias").fill_(6e4)
    images, progress = tiny_splits.validation.images.numpy()[:20], Progress(quiet=True)
    export_package(module, tiny_base, IDENTITY, images, tmp_path / "package", progress)
    record = tmp_path / "parity.json"
    measured = parity_of(module, tmp_path / "package", images, record, progress)
    overflow = measured["Core ML fp16"]
    assert isinstance(overflow, NotMeasured)
    named = r"not finite, beginning with '\w+' \(float16\), which the operator 'linear' makes"
    assert re.search(named, overflow.reason)
    assert isinstance(measured["Core ML fp32"], Parity)
    assert parity_of(module, tmp_path / "package", images, record, progress) == measured
