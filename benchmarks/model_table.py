"""Which of timm's models export with parity, and which can be a keyed base: one row each, as Markdown.

Every model has random weights, at most two blocks and small images where its architecture allows it (but for a few
whole ones, on two images): what is measured
is whether the operators of its kind are exported right, not whether a trained model of full depth stays within the
limits (a package's own parity does that). A number is the largest difference of a logit as a share of the largest, on
random 8-bit images, from torch in float32; ✗ marks one beyond the limits of ``exporters.parity``. Core ML programs are
run by the project's evaluator; where it lacks an operator, the cell says so and the package is only converted. Run::

    python -m benchmarks.model_table [NAME ...]
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.layers.config import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.parity import COREML_FP16, COREML_FP32, ONNX_FP32, ParityLimits, measure_parity
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from exporters.to_coreml import Precision, Target, export_coreml
from exporters.to_onnx import export_onnx
from factory.base import timm_architecture
from factory.networks import traits
from factory.recipes.recipe import ADAPTATION_NEEDS
from keys.errors import InputError

LABELS = tuple(f"class {index}" for index in range(10))
SEED, IMAGES, WHOLE_IMAGES = 0, 16, 2
COREML: tuple[tuple[Precision, Target], ...] = (
    ("fp32", "iOS16"), ("fp16", "iOS16"), ("fp16", "iOS17"), ("fp16", "iOS18"),
)  # fmt: skip
COLUMNS = (
    "model", "what it stands for", "images", "ONNX 20", "ONNX 17, 22",
    *(f"Core ML {precision} {target}" for precision, target in COREML), "adaptations as a base",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A timm model, what it stands for, the side of its images in pixels, how it is made small or that it is whole."""

    name: str
    what: str
    size: int = 64
    arguments: dict[str, Any] = field(default_factory=lambda: {"depth": 2})
    all_opsets: bool = False
    whole: bool = False


ROWS = (
    Row("vit_tiny_patch16_224", "plain ViT", all_opsets=True),
    Row("vit_small_patch32_224", "patches of 32"),
    Row("vit_base_patch16_224", "width 768"),
    Row("vit_base_patch8_224", "patches of 8", 32),
    Row("vit_tiny_patch16_224", "norm of q and k (`qk_norm=True`)", arguments={"depth": 2, "qk_norm": True}),
    Row("aimv2_large_patch14_224", "RMS norm, SwiGLU", 56),
    Row("deit_tiny_patch16_224", "DeiT"),
    Row("deit_tiny_distilled_patch16_224", "two tokens, two heads"),
    Row("deit3_small_patch16_224", "layer scale, no position for the class token"),
    Row("eva02_tiny_patch14_224", "SwiGLU, rotary positions", 56, all_opsets=True),
    Row("eva02_base_patch16_clip_224", "separate q, k, v; norm inside the MLP"),
    Row("eva_large_patch14_196", "EVA", 56),
    Row("vit_small_patch16_rope_224", "rotary positions alone"),
    Row("vit_small_patch16_dinov3", "DINOv3"),
    Row("beit_base_patch16_224", "relative position bias", all_opsets=True),
    Row("beitv2_base_patch16_224", "BEiT v2"),
    Row("vit_small_patch14_dinov2", "DINOv2", 56),
    Row("vit_small_patch14_reg4_dinov2", "register tokens", 56),
    Row("vit_base_patch16_siglip_224", "attention pooling"),
    Row("vit_little_patch16_reg1_gap_256", "average pooling, no class token"),
    Row("vit_wee_patch16_reg1_gap_256", "average pooling, wider MLP"),
    Row("vit_so150m_patch16_reg4_gap_256", "SO150M"),
    Row("vit_so150m2_patch16_reg1_gap_256", "SO150M without qkv bias"),
    Row("flexivit_small", "FlexiViT"),
    Row("vit_srelpos_small_patch16_224", "shared relative positions"),
    Row("vit_tiny_r_s16_p8_224", "hybrid with a ResNet stem"),
    Row("vit_small_patch16_18x2_224", "two attentions side by side"),
    Row("cait_xxs24_224", "talking heads"),
    Row("swin_tiny_patch4_window7_224", "windows", 224, {"depths": (1, 1, 1, 1)}),
    Row("mixer_s32_224", "no attention", 64, {}),
    Row("resnet18", "convolutions", 64, {}),
    Row("resnet18_small", "stem 3×3, no pooling behind it", 32, {}),
    Row("bottleneck_resnet", "the conformity paper's ResNet, depth 20", 32, {"depth": 20}),
    Row("convmixer_small", "ConvMixer-256/2, patches of 2", 32, {"depth": 2}),
    Row("cnn6", "the conformity paper's CNN-6 on RGB", 32, {"in_chans": 3}),
    Row("vgg11_small", "VGG-11 with one linear layer", 32, {}),
    Row("resnet50", "the key-based paper's [16], whole", 224, {}, whole=True),
    Row("convmixer_768_32", "the key-based paper's [67], whole", 224, {}, whole=True),
    Row("vgg11", "133 M parameters, whole", 224, {}, whole=True),
    Row("vgg16", "138 M parameters, whole", 224, {}, whole=True),
)


def build(row: Row) -> nn.Module:
    """The row's model in evaluation mode; every parameter is random, also those that start at zero or one."""
    set_fused_attn(False)
    torch.manual_seed(SEED)
    arguments = timm_architecture(row.name, LABELS, row.size, row.arguments).arguments
    model = timm.create_model(row.name, num_classes=len(LABELS), **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The weights of whole networks are small: with more noise than that, activations would leave float16.
            noise = 0.02 * (float(parameter.std()) if row.whole and parameter.ndim > 1 else 1)
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def cells(row: Row, folder: Path) -> list[str]:
    """The row of the table, in the order of COLUMNS."""
    model = build(row)
    contract = InputContract(channels=3, height=row.size, width=row.size, resize="none")
    levels = np.random.default_rng(SEED).integers(0, 256, (WHOLE_IMAGES if row.whole else IMAGES, *contract.shape))
    images = levels.astype(np.float32) / 255
    reference = TorchRuntime(model)

    def onnx(opset: int) -> str:
        path = folder / f"{opset}.onnx"
        return measured(lambda: export_onnx(model, path, contract, LABELS, opset=opset), lambda: OnnxRuntime(path),
                        ONNX_FP32)  # fmt: skip

    def coreml(precision: Precision, target: Target) -> str:
        path = folder / f"{precision}-{target}.mlpackage"
        return measured(
            lambda: export_coreml(model, path, contract, LABELS, precision=precision, target=target),
            lambda: CoreMLEvaluator(path), COREML_FP32 if precision == "fp32" else COREML_FP16,
        )  # fmt: skip

    def measured(export: Any, load: Any, limits: ParityLimits) -> str:
        try:
            export()
        except InputError as error:
            return f"refused: {error}"
        try:
            runtime: Runtime = load()
        except InputError as error:
            found = str(error).split("'")
            return f"converts; not run: {found[1]}" if "not known to the evaluator" in str(error) else f"✗ {error}"
        # On random weights and few images the class may change where logits tie: the difference alone decides here.
        parity = measure_parity(reference, runtime, images, limits)
        return f"{parity.max_relative_difference:.0e}{'' if parity.max_relative_difference <= parity.limit else ' ✗'}"

    others = f"{onnx(17)}, {onnx(22)}" if row.all_opsets else "not measured"
    exports = [onnx(20), others, *(coreml(*kind) for kind in COREML)]
    return [f"`{row.name}`", row.what, f"{row.size}", *exports, keyed(model)]


def keyed(model: nn.Module) -> str:
    """Which adaptations the model can take as a base."""
    found = traits(model)
    return ", ".join(name for name, needs in ADAPTATION_NEEDS.items() if found.issuperset(needs))


def versions() -> str:
    """The versions that decide the figures."""
    names: tuple[Literal["torch", "timm", "onnx", "onnxruntime", "coremltools", "numpy"], ...] = (
        "torch", "timm", "onnx", "onnxruntime", "coremltools", "numpy",
    )  # fmt: skip
    return ", ".join([f"Python {platform.python_version()}", *(f"{n} {importlib.metadata.version(n)}" for n in names)])


def main(names: list[str]) -> None:
    """Print the table of all rows, or of those named."""
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        sys.exit(f"There is no row for {', '.join(unknown)}; the names are in benchmarks/model_table.py.")
    print(f"Seed {SEED}, {IMAGES} random images. {versions()}.\n")
    print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n", flush=True)
    for row in ROWS:
        if not names or row.name in names:
            with tempfile.TemporaryDirectory() as folder:
                print("| " + " | ".join(cells(row, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
