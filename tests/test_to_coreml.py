"""Core ML export: a classifier with an image input, nothing of the machine, the same bytes, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.quiet import import_coremltools, quiet
from exporters.run_coreml import CoreMLEvaluator, CoreMLPredict, best_coreml_runtime, eight_bit, predict_unavailable
from exporters.run_torch import TorchRuntime
from exporters.to_coreml import MODEL_PATH, WEIGHTS_PATH, export_coreml
from factory.data import FASHION_MNIST_LABELS, SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError, StorageError

CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
SMALL = InputContract(channels=1, height=4, width=4, resize="none")
LABELS = list(FASHION_MNIST_LABELS)
FILES = ["Manifest.json", MODEL_PATH, WEIGHTS_PATH]


def tiny_vit() -> nn.Module:
    set_fused_attn(False)
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, pretrained=False, **sizes).eval()


def linear(value: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        module[1].weight[0, 1] = value
    return module


def real_images(count: int) -> np.ndarray:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return read_idx(path)[:count, np.newaxis].astype(np.float32) / 255


def specification(package: Path) -> Any:
    messages = import_coremltools("coremltools.proto.Model_pb2")
    return messages.Model.FromString((package / MODEL_PATH).read_bytes())


def strings(message: Any) -> list[str]:
    """Every text in a protobuf message, keys of its dictionaries included."""
    found = []
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found += [key for key in value if isinstance(key, str)]
            value = [part for part in value.values() if hasattr(part, "ListFields")]
        for part in value if field.is_repeated else [value]:
            if isinstance(part, str):
                found.append(part)
            elif hasattr(part, "ListFields"):
                found += strings(part)
    return found


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def package(module: nn.Module, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coreml") / f"{request.param}.mlpackage"
    export_coreml(module, path, CONTRACT, LABELS, precision=request.param)
    return path


def test_is_a_classifier_of_images(package: Path) -> None:
    spec = specification(package)
    description = spec.description
    (image,) = description.input
    kind = image.type.imageType
    assert (image.name, kind.height, kind.width) == ("image", 28, 28)
    assert kind.colorSpace == kind.GRAYSCALE
    assert [output.name for output in description.output] == ["classLabel", "classLabel_probs", "logits"]
    assert description.predictedFeatureName == "classLabel"
    assert description.predictedProbabilitiesName == "classLabel_probs"
    logits = description.output[2].type.multiArrayType
    assert list(logits.shape) == [1, 10]
    assert logits.dataType == logits.FLOAT32
    # Version 7 is iOS 16 and macOS 13.
    assert (spec.specificationVersion, spec.WhichOneof("Type")) == (7, "mlProgram")


def test_coremltools_reads_it(package: Path) -> None:
    ct = import_coremltools()
    model = ct.models.MLModel(str(package), skip_model_load=True)
    assert model.get_spec() == specification(package)


def test_holds_exactly_its_three_files(package: Path) -> None:
    found = sorted(path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file())
    assert found == sorted(FILES)
    manifest = json.loads((package / "Manifest.json").read_text())
    paths = {entry["path"] for entry in manifest["itemInfoEntries"].values()}
    assert all((package / "Data" / path).exists() for path in paths)
    assert manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["name"] == "model.mlmodel"


def test_answers_with_the_class_names(module: nn.Module, package: Path) -> None:
    images = real_images(20)
    expected = TorchRuntime(module).logits(images)
    runtime = CoreMLEvaluator(package)
    assert runtime.classes(images) == [LABELS[k] for k in runtime.logits(images).argmax(axis=1)]
    np.testing.assert_allclose(runtime.logits(images), expected, atol=0.02 * np.abs(expected).max())


def test_probabilities_are_the_softmax_of_the_logits(package: Path) -> None:
    runtime = CoreMLEvaluator(package)
    levels = eight_bit(real_images(5), (1, 28, 28)).astype(np.float32)
    outputs = runtime._evaluator.run({"image": levels[:, np.newaxis]})
    logits = torch.from_numpy(outputs["logits"])
    np.testing.assert_allclose(outputs["classLabel_probs"], logits.softmax(-1).numpy(), rtol=1e-6)


def test_tells_nothing_of_the_machine(package: Path) -> None:
    spec = specification(package)
    assert not spec.description.metadata.ListFields()
    texts = [text for text in strings(spec) if text not in LABELS and text != "@model_path/weights/weight.bin"]
    assert len(texts) > 100
    assert [text for text in texts if "/" in text or ".py" in text or "torch" in text] == []


def test_same_module_same_bytes(module: nn.Module, package: Path, tmp_path: Path) -> None:
    precision = CoreMLEvaluator(package).precision
    assert precision == package.stem
    export_coreml(module, tmp_path / "again.mlpackage", CONTRACT, LABELS, precision=precision)
    assert [(tmp_path / "again.mlpackage" / f).read_bytes() for f in FILES] == [
        (package / f).read_bytes() for f in FILES
    ]


def test_colour_and_quiet(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    contract = InputContract(channels=3, height=2, width=2, resize="none")
    export_coreml(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(),
        tmp_path / "m.mlpackage",
        contract,
        ["a", "b"],
        precision="fp16",
    )
    assert capfd.readouterr() == ("", "")
    kind = specification(tmp_path / "m.mlpackage").description.input[0].type.imageType
    assert kind.colorSpace == kind.RGB


def test_replaces_an_older_package(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    for value in (1.0, 2.0):
        export_coreml(linear(value), path, SMALL, ["a", "b"], precision="fp32")
        images = np.full((1, 1, 4, 4), 1.0, np.float32)
        np.testing.assert_allclose(
            CoreMLEvaluator(path).logits(images), TorchRuntime(linear(value)).logits(images), rtol=1e-5
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.mlpackage"]


class CumulativeSum(nn.Module):
    """Something that the evaluator does not know, as a stand-in for tomorrow's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(image.flatten(1).cumsum(1))


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    export_coreml(CumulativeSum().eval(), tmp_path / "m.mlpackage", SMALL, ["a", "b"], precision="fp32")
    with pytest.raises(InputError, match="The operator 'cumsum'"):
        CoreMLEvaluator(tmp_path / "m.mlpackage")


class Unconvertible(nn.Module):
    """An operator that coremltools has no translation for."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(image.flatten(1))[:, :2]


REFUSED = [
    (linear(float("nan")), ["a", "b"], "fp32", r"tensor 1\.weight holds NaN"),
    (linear(1e6), ["a", "b"], "fp16", r"tensor 1\.weight holds 1e\+06, more than float16 can \(65504\)"),
    (linear(1e6), ["a", "b"], "int8", r"tensor 1\.weight holds 1e\+06, more than float16 can"),
    (linear(1e6), ["a", "b"], "palettized", r"tensor 1\.weight holds 1e\+06, more than float16 can"),
    (linear(float("nan")), ["a", "b"], "int8", r"tensor 1\.weight holds NaN"),
    (linear(float("inf")), ["a", "b"], "palettized", r"tensor 1\.weight holds NaN or infinite"),
    (linear(), ["a", "b"], "int4", "precision 'int4' is unknown; choose one of fp32, fp16, int8, palettized"),
    (linear(), ["a", "b", "c"], "fp16", "2 logits and there are 3 class names"),
    (linear(), ["a", "a"], "fp16", "'a' is used 2 times"),
    (Unconvertible().eval(), ["a", "b"], "fp32", "coremltools cannot convert this model to Core ML: .*i0e"),
]


@pytest.mark.parametrize(("module", "labels", "precision", "sentence"), REFUSED)
def test_refuses_with_a_sentence(
    module: nn.Module, labels: list[str], precision: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        export_coreml(module, tmp_path / "m.mlpackage", SMALL, labels, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target 'iOS15' is unknown; choose one of iOS16, iOS17, iOS18"):
        export_coreml(linear(), tmp_path / "m.mlpackage", SMALL, ["a", "b"], target="iOS15")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "version"), [("iOS16", 7), ("iOS17", 8), ("iOS18", 9)])
def test_the_target_is_the_oldest_system(target: Any, version: int, tmp_path: Path) -> None:
    export_coreml(linear(), tmp_path / "m.mlpackage", SMALL, ["a", "b"], target=target)
    assert specification(tmp_path / "m.mlpackage").specificationVersion == version


# coremltools itself decompresses: what the package holds is then an ordinary fp16 program for the evaluator.
@pytest.mark.parametrize(("precision", "smaller", "difference"), [("int8", 0.65, 0.03), ("palettized", 0.6, 0.15)])
def test_compressed_weights_are_smaller_and_answer_alike(
    module: nn.Module, precision: Any, smaller: float, difference: float, tmp_path: Path
) -> None:
    ct = import_coremltools()
    export_coreml(module, tmp_path / "fp16.mlpackage", CONTRACT, LABELS, precision="fp16")
    export_coreml(module, tmp_path / "m.mlpackage", CONTRACT, LABELS, precision=precision)
    sizes = [(tmp_path / name / WEIGHTS_PATH).stat().st_size for name in ("fp16.mlpackage", "m.mlpackage")]
    assert sizes[1] < smaller * sizes[0]
    with quiet():
        model = ct.models.MLModel(str(tmp_path / "m.mlpackage"), skip_model_load=True)
        optimize = import_coremltools("coremltools.optimize.coreml")
        optimize.decompress_weights(model).save(str(tmp_path / "plain.mlpackage"))
    images = real_images(20)
    expected = TorchRuntime(module).logits(images)
    found = CoreMLEvaluator(tmp_path / "plain.mlpackage").logits(images)
    np.testing.assert_allclose(found, expected, atol=difference * np.abs(expected).max())
    # The compressed values were used: float16 alone is closer than this.
    assert np.abs(found - CoreMLEvaluator(tmp_path / "fp16.mlpackage").logits(images)).max() > 0


def test_weights_beyond_float16_export_in_fp32(tmp_path: Path) -> None:
    export_coreml(linear(1e6), tmp_path / "m.mlpackage", SMALL, ["a", "b"], precision="fp32")
    images = np.full((1, 1, 4, 4), 1.0, np.float32)
    assert CoreMLEvaluator(tmp_path / "m.mlpackage").logits(images)[0, 0] == pytest.approx(1e6, rel=1e-5)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the operating system refuse larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_cannot_be_written_leave_the_old_package(module: nn.Module, package: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(package, tmp_path / "m.mlpackage"))
    with files_of_at_most(65_536), pytest.raises(StorageError, match="could not be written to"):
        export_coreml(module, path, CONTRACT, LABELS, precision="fp32")
    assert [(path / name).read_bytes() for name in FILES] == [(package / name).read_bytes() for name in FILES]
    assert [path.name for path in tmp_path.iterdir()] == ["m.mlpackage"]


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML predicts here")
def test_predict_says_why_it_cannot_run(package: Path) -> None:
    reason = predict_unavailable()
    assert reason is not None
    assert "macOS only" in reason.reason
    with pytest.raises(InputError, match="Not measured: Core ML predicts on macOS only"):
        CoreMLPredict(package)
    assert best_coreml_runtime(package).name == "coreml-evaluator"


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML predicts on macOS only")
def test_predict_agrees_with_the_evaluator(package: Path) -> None:
    images = real_images(20)
    found, expected = CoreMLPredict(package).logits(images), CoreMLEvaluator(package).logits(images)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_images_are_rounded_to_eight_bits() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images = levels.astype(np.float32) / 255
    assert np.array_equal(eight_bit(images, (1, 16, 16)), levels)
    nudged = np.clip(images + np.float32(0.4 / 255), 0, 1)
    assert np.array_equal(eight_bit(nudged, (1, 16, 16)), levels)
