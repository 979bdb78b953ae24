"""The validator: what a device measures, what fails a receipt, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from device_tests.evidence import Proportion
from device_tests.labelled_images import read_labelled_images
from device_tests.latency import measure_latency
from device_tests.receipt import write_receipt
from device_tests.validate import CORE_ML, ONNXRUNTIME, validate
from exporters.golden import GOLDEN_NAME, Golden, read_golden
from exporters.manifest import Manifest
from exporters.measured import NotMeasured
from exporters.package import inspect_package, sign_package, write_package
from keys.errors import InputError, PackageError
from keys.signing import SigningKey


def released_again(package: Path, key: SigningKey, **files: bytes) -> Path:
    """The package with other content, released by the factory: ``model``, ``golden`` replace its files."""
    manifest, _ = inspect_package(package)
    for name, data in files.items():
        (package / {"model": "model.onnx", "golden": GOLDEN_NAME}[name]).write_bytes(data)
    write_package(package, manifest)
    sign_package(package, key)
    return package


def golden_of(package: Path, manifest: Manifest) -> Golden:
    return read_golden((package / GOLDEN_NAME).read_bytes(), manifest.input, len(manifest.labels))


def weights_of(package: Path) -> tuple[np.ndarray, np.ndarray]:
    model = onnx.load_from_string((package / "model.onnx").read_bytes())
    weight, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return weight, bias


def labelled(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_a_released_package_passes_on_this_device(device_package: Path, signing_key: SigningKey) -> None:
    receipt = validate(device_package, signing_key.public_bytes, device_id="camera-01", runtime=ONNXRUNTIME)
    assert (receipt.passed, receipt.reasons) == (True, ())
    assert (receipt.device_id, receipt.generation, receipt.fleet_id) == ("camera-01", 1, "00112233445566ff")
    assert receipt.runtime == "onnxruntime"
    assert (receipt.golden.n, receipt.golden.top1_agreement) == (8, 1.0)
    assert receipt.golden.max_relative_difference < receipt.golden.limit == 1e-4
    assert receipt.accuracy == NotMeasured("no labelled images were given")
    assert 0 < receipt.latency.median_ms <= receipt.latency.p95_ms


def test_a_receipt_is_json_and_names_the_exact_package(
    device_package: Path, signing_key: SigningKey, tmp_path: Path
) -> None:
    receipt = validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)
    path = tmp_path / "receipts" / "receipt.json"
    write_receipt(path, receipt, package=device_package)
    document = json.loads(path.read_bytes())
    assert document == receipt.to_json()
    manifest = (device_package / "manifest.json").read_bytes()
    assert document["package_digest"] == hashlib.sha256(manifest).hexdigest()
    assert document["accuracy"] == {"not_measured": "no labelled images were given"}
    assert document["latency"]["batch"] == 1
    assert document["schema"] == 1


def test_a_receipt_is_not_written_into_the_package(device_package: Path, signing_key: SigningKey) -> None:
    receipt = validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)
    for inside in [device_package / "receipt.json", device_package / "new" / "receipt.json"]:
        with pytest.raises(InputError, match="inside the package"):
            write_receipt(inside, receipt, package=device_package)
    assert validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME).passed


def test_accuracy_is_measured_on_labelled_images(
    device_package: Path, signing_key: SigningKey, manifest: Manifest, tmp_path: Path
) -> None:
    golden = golden_of(device_package, manifest)
    labels = golden.logits.argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % 3
    data = labelled(tmp_path / "data.npz", images=golden.images, labels=labels)
    receipt = validate(device_package, signing_key.public_bytes, data=data, runtime=ONNXRUNTIME)
    assert receipt.accuracy == Proportion(6, 8)
    assert receipt.passed


@pytest.mark.parametrize(("minimum", "passed"), [(0.75, True), (0.76, False)])
def test_the_accuracy_must_reach_the_minimum(
    minimum: float,
    passed: bool,
    device_package: Path,
    signing_key: SigningKey,
    manifest: Manifest,
    tmp_path: Path,
) -> None:
    golden = golden_of(device_package, manifest)
    labels = golden.logits.argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % 3
    data = labelled(tmp_path / "data.npz", images=golden.images, labels=labels)
    receipt = validate(
        device_package,
        signing_key.public_bytes,
        data=data,
        minimum_accuracy=minimum,
        runtime=ONNXRUNTIME,
    )
    assert receipt.passed is passed
    assert [r.split(",")[0] for r in receipt.reasons] == (
        [] if passed else ["The accuracy is 0.7500 on 8 images (95 % interval 0.4093 to 0.9285)"]
    )


def test_a_minimum_accuracy_is_checked(device_package: Path, signing_key: SigningKey) -> None:
    with pytest.raises(InputError, match="needs labelled images"):
        validate(device_package, signing_key.public_bytes, minimum_accuracy=0.5, runtime=ONNXRUNTIME)
    with pytest.raises(InputError, match="between 0 and 1, not 90"):
        validate(device_package, signing_key.public_bytes, minimum_accuracy=90, runtime=ONNXRUNTIME)


def test_other_golden_logits_than_the_factory_saw_fail_the_receipt(
    device_package: Path, signing_key: SigningKey, manifest: Manifest
) -> None:
    golden = golden_of(device_package, manifest)
    off = golden.logits + np.float32(2e-4) * np.abs(golden.logits).max()
    released_again(device_package, signing_key, golden=Golden(golden.images, off).to_bytes())
    receipt = validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)
    assert not receipt.passed
    assert receipt.golden.top1_agreement == 1.0
    assert len(receipt.reasons) == 1
    assert "logits differ from the factory's by up to 0.0002" in receipt.reasons[0]
    assert json.loads(json.dumps(receipt.to_json()))["passed"] is False


def test_another_class_fails(device_package: Path, signing_key: SigningKey, manifest: Manifest) -> None:
    golden = golden_of(device_package, manifest)
    turned = np.roll(golden.logits, 1, axis=1)
    released_again(device_package, signing_key, golden=Golden(golden.images, turned).to_bytes())
    receipt = validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)
    assert not receipt.passed
    assert "with the same class on 0.0%" in receipt.reasons[0]


def test_a_tampered_package_is_never_run(device_package: Path, signing_key: SigningKey) -> None:
    (device_package / "model.onnx").write_bytes(b"x" * (device_package / "model.onnx").stat().st_size)
    with pytest.raises(PackageError, match=r"'model\.onnx' was changed"):
        validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)


def test_a_package_of_another_device_is_refused(device_package: Path, signing_key: SigningKey) -> None:
    with pytest.raises(PackageError, match="made for device 'camera-01', not for 'camera-02'"):
        validate(device_package, signing_key.public_bytes, device_id="camera-02", runtime=ONNXRUNTIME)


def test_a_package_without_golden_images_is_refused(device_package: Path, signing_key: SigningKey) -> None:
    (device_package / GOLDEN_NAME).unlink()
    released_again(device_package, signing_key)
    with pytest.raises(PackageError, match=r"has no file 'golden\.npz'"):
        validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)


def test_a_model_that_cannot_be_loaded_is_an_error(device_package: Path, signing_key: SigningKey) -> None:
    released_again(device_package, signing_key, model=b"no model")
    with pytest.raises(InputError, match="onnxruntime cannot load the ONNX model"):
        validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)


def test_a_model_with_another_number_of_classes_is_refused(
    device_package: Path, signing_key: SigningKey, manifest: Manifest
) -> None:
    golden = golden_of(device_package, manifest)
    four = Golden(golden.images, np.ones((8, 4), np.float32))
    write_package(device_package, dataclasses.replace(manifest, labels=("a", "b", "c", "d")))
    released_again(device_package, signing_key, golden=four.to_bytes())
    with pytest.raises(PackageError, match="gives 3 logits, but the manifest names 4 classes"):
        validate(device_package, signing_key.public_bytes, runtime=ONNXRUNTIME)


@pytest.mark.parametrize(
    "images",
    [
        np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8),
        np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1),
        np.arange(128, dtype=np.uint8).reshape(2, 8, 8),
    ],
    ids=["N,C,H,W", "N,H,W,C", "N,H,W"],
)
def test_images_come_in_three_layouts(images: np.ndarray, manifest: Manifest, tmp_path: Path) -> None:
    path = labelled(tmp_path / "data.npz", images=images, labels=np.array([0, 2], np.uint8))
    read = read_labelled_images(path, manifest.input, 3)
    np.testing.assert_array_equal(read.images, np.arange(128).reshape(2, 1, 8, 8))
    np.testing.assert_array_equal(read.labels, [0, 2])


def test_color_images_keep_their_channels(manifest: Manifest, tmp_path: Path) -> None:
    contract = dataclasses.replace(manifest.input, channels=3)
    images = np.arange(2 * 3 * 64, dtype=np.uint16).astype(np.uint8).reshape(2, 3, 8, 8)
    last = labelled(tmp_path / "data.npz", images=images.transpose(0, 2, 3, 1), labels=np.array([0, 1]))
    np.testing.assert_array_equal(read_labelled_images(last, contract, 3).images, images)


IMAGES, LABELS = np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64)
DATA_FAULTS: list[tuple[str, dict[str, np.ndarray], str]] = [
    ("the labels are missing", {"images": IMAGES}, "has no array 'labels'"),
    ("the images are missing", {"labels": LABELS}, "has no array 'images'"),
    ("the images are floats", {"images": IMAGES / 255, "labels": LABELS}, "images of float64"),
    ("the images are 16-bit", {"images": IMAGES.astype(np.uint16), "labels": LABELS}, "images of uint16"),
    ("the images have another size", {"images": IMAGES[..., :7], "labels": LABELS}, r"shape \(N, 1, 8, 8\)"),
    ("the images have colours", {"images": IMAGES.repeat(3, 1), "labels": LABELS}, "bicubic to 8x8"),
    ("the images are flat", {"images": IMAGES.reshape(4, 64), "labels": LABELS}, r"shape \(4, 64\)"),
    ("a label is missing", {"images": IMAGES, "labels": LABELS[:3]}, "4 images and 3 labels"),
    ("there are no images", {"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no images"),
    ("a label is a float", {"images": IMAGES, "labels": LABELS / 1.0}, "one integer for each"),
    ("the labels are one-hot", {"images": IMAGES, "labels": np.eye(4, dtype=int)}, "one integer for each"),
    ("a label is too large", {"images": IMAGES, "labels": LABELS + 3}, "labels from 3 to 3, but"),
    ("a label is negative", {"images": IMAGES, "labels": LABELS - 1}, "labels from -1 to -1"),
    ("a label is an object", {"images": IMAGES, "labels": np.array([None] * 4)}, "no plain array"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "arrays", "sentence"), DATA_FAULTS, ids=[f[0] for f in DATA_FAULTS])
def test_labelled_images_are_refused_when(
    what: str, arrays: dict[str, np.ndarray], sentence: str, manifest: Manifest, tmp_path: Path
) -> None:
    path = labelled(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=sentence) as refusal:
        read_labelled_images(path, manifest.input, 3)
    assert "\n" not in str(refusal.value)


def test_a_data_file_that_is_missing_or_no_archive_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_labelled_images(tmp_path / "none.npz", manifest.input, 3)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"no readable \.npz file"):
        read_labelled_images(tmp_path / "text.npz", manifest.input, 3)


class Counting:
    """A runtime that only counts its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.calls += 1
        return np.zeros((len(images), 2), np.float32)


def test_latency_is_the_median_and_the_95th_percentile_after_a_warm_up() -> None:
    # Each run reads the clock twice: at 0 and at its duration of 1, 2, … 100 ms, in another order.
    durations = np.random.default_rng(0).permutation(np.arange(1, 101)) * 1_000_000
    ticks = iter([tick for duration in durations for tick in (0, int(duration))])
    runtime = Counting()
    latency = measure_latency(
        runtime,
        np.zeros((1, 1, 8, 8), np.float32),
        runs=100,
        warm_up=7,
        clock=lambda: next(ticks),
    )
    assert (latency.median_ms, latency.p95_ms) == (50.5, 95.0)
    assert (latency.runs, latency.warm_up, runtime.calls) == (100, 7, 107)


def test_core_ml_stands_behind_the_same_interface(
    device_package: Path, signing_key: SigningKey, manifest: Manifest
) -> None:
    """The NumPy evaluator takes the place of Core ML, which runs on macOS only."""
    import torch

    from exporters.run_coreml import CoreMLEvaluator
    from exporters.to_coreml import export_coreml

    weight, bias = weights_of(device_package)
    linear = torch.nn.Linear(64, 3)
    linear.load_state_dict({"weight": torch.tensor(weight.T.copy()), "bias": torch.tensor(bias.copy())})
    module = torch.nn.Sequential(torch.nn.Flatten(), linear).eval()
    export_coreml(
        module,
        device_package / "model.mlpackage",
        manifest.input,
        manifest.labels,
        precision="fp16",
    )
    released_again(device_package, signing_key)
    evaluator = dataclasses.replace(
        CORE_ML,
        load=lambda package, scratch: CoreMLEvaluator(package.copy_folder("model.mlpackage", scratch)),
    )
    receipt = validate(device_package, signing_key.public_bytes, runtime=evaluator)
    assert receipt.passed, receipt.reasons
    assert (receipt.runtime, receipt.golden.precision) == ("coreml-evaluator", "fp16")
    golden = golden_of(device_package, manifest)
    turned = Golden(golden.images, np.roll(golden.logits, 1, axis=1))
    released_again(device_package, signing_key, golden=turned.to_bytes())
    assert not validate(device_package, signing_key.public_bytes, runtime=evaluator).passed


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML predicts here")
def test_core_ml_needs_a_mac(device_package: Path, signing_key: SigningKey) -> None:
    (device_package / "model.mlpackage").mkdir()
    (device_package / "model.mlpackage" / "Manifest.json").write_text("{}")
    released_again(device_package, signing_key)
    with pytest.raises(InputError, match="Core ML predicts on macOS only"):
        validate(device_package, signing_key.public_bytes, runtime=CORE_ML)


def test_a_package_without_core_ml_is_a_clear_error(device_package: Path, signing_key: SigningKey) -> None:
    with pytest.raises(PackageError, match=r"has no folder 'model\.mlpackage'"):
        validate(device_package, signing_key.public_bytes, runtime=CORE_ML)
