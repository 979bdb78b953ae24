"""Parity on real images for every format, and the comparison itself: limits, ties, values that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.parity import COREML_FP16, COREML_FP32, ONNX_FP32, Parity, ParityLimits, compare, measure_parity
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from exporters.to_coreml import export_coreml
from exporters.to_onnx import export_onnx
from factory.data import FASHION_MNIST_LABELS, SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError

LABELS = list(FASHION_MNIST_LABELS)


class Shuffled(nn.Module):
    """A shuffle that stays in the graph, then normalisation per channel, then the model."""

    def __init__(self, module: nn.Module, channels: int, block: int) -> None:
        super().__init__()
        self.module, self.block = module, block
        self.register_buffer("order", torch.randperm(channels * block * block))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:channels].view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:channels].view(1, -1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        blocks = nn.functional.pixel_unshuffle(image, self.block)[:, self.order]
        return self.module((nn.functional.pixel_shuffle(blocks, self.block) - self.mean) / self.std)


class ShuffledBySixAxes(Shuffled):
    """The same shuffle as reshapes of six axes, which Core ML, with five at most, has to break up."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        (_, c, h, w), m = image.shape, self.block
        blocks = image.reshape(-1, c, h // m, m, w // m, m).permute(0, 2, 4, 1, 3, 5)
        blocks = blocks.reshape(-1, (h // m) * (w // m), c * m * m).index_select(2, self.order)
        blocks = blocks.reshape(-1, h // m, w // m, c, m, m).permute(0, 3, 1, 4, 2, 5)
        return self.module((blocks.reshape(-1, c, h, w) - self.mean) / self.std)


def tiny_vit(channels: int, size: int, **changes: object) -> nn.Module:
    set_fused_attn(False)
    sizes: dict = {"img_size": size, "patch_size": size // 4, "embed_dim": 64, "depth": 2, "num_heads": 2, **changes}
    return timm.create_model("vit_tiny_patch16_224", in_chans=channels, num_classes=10, pretrained=False, **sizes)


MODELS = {
    "grey": lambda: tiny_vit(1, 28),
    "grey, shuffle in the graph": lambda: Shuffled(tiny_vit(1, 28, depth=1), 1, 14),
    "RGB, shuffle of six axes": lambda: ShuffledBySixAxes(
        tiny_vit(3, 32, depth=1, qk_norm=True, init_values=0.1), 3, 16
    ),
}


def real_images(channels: int, size: int) -> np.ndarray:
    """256 test images; for RGB three different ones stand for the channels, padded to the size."""
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    images = read_idx(path)[: 256 * channels].reshape(256, channels, 28, 28)
    margin = (size - 28) // 2
    return np.pad(images, [(0, 0), (0, 0), (margin, margin), (margin, margin)]).astype(np.float32) / 255


@pytest.mark.parametrize("name", MODELS)
def test_every_format_answers_as_torch_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    channels, size = (3, 32) if "RGB" in name else (1, 28)
    contract = InputContract(channels=channels, height=size, width=size, resize="none")
    export_onnx(module, tmp_path / "m.onnx", contract, LABELS)
    export_coreml(module, tmp_path / "m32.mlpackage", contract, LABELS, precision="fp32")
    export_coreml(module, tmp_path / "m16.mlpackage", contract, LABELS, precision="fp16")
    candidates: list[tuple[Runtime, ParityLimits]] = [
        (OnnxRuntime(tmp_path / "m.onnx", threads=1), ONNX_FP32),
        (CoreMLEvaluator(tmp_path / "m32.mlpackage"), COREML_FP32),
        (CoreMLEvaluator(tmp_path / "m16.mlpackage"), COREML_FP16),
    ]
    images = real_images(channels, size)
    results = [measure_parity(TorchRuntime(module), runtime, images, limits) for runtime, limits in candidates]
    assert [result.n for result in results] == [256] * 3
    assert [result.runtime for result in results] == ["onnxruntime", "coreml-evaluator", "coreml-evaluator"]
    assert all(result.passed for result in results), results
    # fp16 is really computed: were it not rounded, it would be as close as fp32.
    assert results[2].max_relative_difference > 10 * results[1].max_relative_difference


def test_another_key_fails_parity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = tiny_vit(1, 28)
    module, other = Shuffled(vit, 1, 4).eval(), Shuffled(vit, 1, 4).eval()
    contract = InputContract(channels=1, height=28, width=28, resize="none")
    export_coreml(other, tmp_path / "m.mlpackage", contract, LABELS, precision="fp16")
    result = measure_parity(
        TorchRuntime(module), CoreMLEvaluator(tmp_path / "m.mlpackage"), real_images(1, 28), COREML_FP16
    )
    assert not result.passed


REFERENCE = np.array([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.5, 0.25]], np.float32)


def compared(measured: np.ndarray, limit: float = 0.01, top1_limit: float = 1.0) -> Parity:
    return compare(REFERENCE, measured, limit, top1_limit, runtime="onnxruntime", precision="fp32")


def test_the_difference_is_relative_to_the_largest_reference_logit() -> None:
    result = compared(REFERENCE + np.array([[0, 0], [0, 0], [0, 0.02], [0, 0]], np.float32))
    assert result.max_relative_difference == pytest.approx(0.005)
    assert (result.n, result.top1_agreement, result.passed) == (4, 1.0, True)


@pytest.mark.parametrize(("limit", "passed"), [(0.0049, False), (0.0051, True)])
def test_the_limit_on_the_difference_decides(limit: float, passed: bool) -> None:
    assert compared(REFERENCE + np.float32(0.02), limit=limit).passed is passed


@pytest.mark.parametrize(("top1_limit", "passed"), [(0.76, False), (0.75, True)])
def test_the_limit_on_the_top1_decides(top1_limit: float, passed: bool) -> None:
    changed = REFERENCE.copy()
    changed[3] = [0.25, 0.5]
    result = compared(changed, limit=1.0, top1_limit=top1_limit)
    assert (result.top1_agreement, result.passed) == (0.75, passed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_never_pass(value: float) -> None:
    measured = REFERENCE.copy()
    measured[0, 0] = value
    result = compared(measured, limit=math.inf, top1_limit=0.5)
    assert (result.max_relative_difference, result.top1_agreement) == (math.inf, 0.75)
    assert not result.passed


@pytest.mark.parametrize(
    ("reference", "measured", "sentence"),
    [
        (REFERENCE, REFERENCE[:3], "must have one shape"),
        (REFERENCE[:0], REFERENCE[:0], "must have one shape"),
        (REFERENCE[0], REFERENCE[0], "must have one shape"),
        (REFERENCE * 0, REFERENCE, "the largest is 0"),
        (REFERENCE * np.nan, REFERENCE, "the largest is nan"),
    ],
)
def test_a_useless_comparison_is_refused(reference: np.ndarray, measured: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compare(reference, measured, 1e-4, 1.0, runtime="torch", precision="fp32")


def test_json_round_trip() -> None:
    for measured in (REFERENCE, REFERENCE * np.float32(np.nan)):
        result = compared(measured)
        text = json.dumps(result.to_json(), allow_nan=False)
        assert Parity.from_json(json.loads(text)) == result


@pytest.mark.parametrize("change", [{"more": 1}, {"n": "4"}, {"passed": 1}, {"limit": None}])
def test_json_is_strict(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a parity value"):
        Parity.from_json({**compared(REFERENCE).to_json(), **change})


def test_limits_are_the_documented_ones() -> None:
    assert ParityLimits("fp32", 1e-4, 1.0) == ONNX_FP32
    assert ParityLimits("fp32", 1e-3, 1.0) == COREML_FP32
    assert ParityLimits("fp16", 2e-2, 0.995) == COREML_FP16
