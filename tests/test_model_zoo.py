"""Kinds of ViT as keyed bases: one step of training, merged, folded, exported to ONNX and Core ML with parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.contract import InputContract
from exporters.parity import COREML_FP32, ONNX_FP32, measure_parity
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_coreml import export_coreml
from exporters.to_onnx import export_onnx
from factory.adaptation import adapt, load_adapter, merge, save_adapter
from factory.base import build_network, timm_architecture
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.folding import bake, fold
from factory.recipes.recipe import RecipeSettings
from factory.vits import KeyedVit, attention_projections, heads
from keys.errors import InputError

LABELS = tuple(f"class {index}" for index in range(5))
SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 1}
# Kind of ViT by timm's name, and the attention projections and heads that it has.
KINDS = {
    "vit_tiny_patch16_224": (1, 1),
    "deit_tiny_distilled_patch16_224": (1, 2),
    "deit3_small_patch16_224": (1, 1),
    "eva02_tiny_patch14_224": (1, 1),
    "eva02_base_patch16_clip_224": (3, 1),
    "beit_base_patch16_224": (1, 1),
    "vit_small_patch14_reg4_dinov2": (1, 1),
}


def build(name: str) -> tuple[KeyedVit, InputContract]:
    architecture = timm_architecture(name, LABELS, 16, SIZES)
    vit = build_network(architecture, seed=1)
    assert isinstance(vit, KeyedVit)
    # Random in every parameter: what is zero at the start (biases, position tables) takes part.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return vit, architecture.contract


def images(count: int) -> np.ndarray:
    levels = np.random.default_rng(3).integers(0, 256, (count, 3, 16, 16))
    return levels.astype(np.float32) / 255


def keyed(vit: nn.Module) -> ImageClassifier:
    permutation = np.random.default_rng(4).permutation(3 * 8 * 8)
    return ImageClassifier(vit, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), BlockShuffle(permutation, channels=3, block_size=8))


def trained(vit: KeyedVit, recipe: RecipeSettings) -> nn.Module:
    """``vit`` after one step in which every trained parameter got a gradient."""
    torch.manual_seed(5)
    model = adapt(vit, recipe)
    # LoRA starts with zeros on one side, which gives the other no gradient.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    batch = torch.from_numpy(images(4))
    torch.nn.functional.cross_entropy(keyed(model.train())(batch), torch.tensor([0, 1, 2, 3])).backward()
    without = [name for name, p in parameters.items() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert without == []
    optimiser.step()
    return model.eval()


@pytest.mark.parametrize(("name", "parts"), KINDS.items())
def test_a_kind_is_keyed_and_exported(name: str, parts: tuple[int, int], tmp_path: Path) -> None:
    vit, contract = build(name)
    projections = attention_projections(vit)
    assert (len(projections), len(heads(vit))) == parts
    recipe = RecipeSettings(rank=2)
    model = trained(vit, recipe)
    batch = torch.from_numpy(images(8))
    with torch.no_grad():
        expected = keyed(model)(batch)
        base = keyed(vit)(batch)
        torch.testing.assert_close(keyed(merge(model))(batch), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(base, expected, atol=1e-2)
        moved = {
            key for key, tensor in merge(model).state_dict().items() if not torch.equal(tensor, vit.state_dict()[key])
        }
        folded = fold(keyed(merge(model)))
        torch.testing.assert_close(folded(batch), expected, atol=1e-4, rtol=1e-4)
    assert moved == {
        "patch_embed.proj.weight",
        *(f"blocks.0.attn.{projection}.weight" for projection in projections),
        *(f"{head}.{part}" for head in heads(vit) for part in ("weight", "bias")),
    }

    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(keyed(load_adapter(vit, recipe, tmp_path / "adapter"))(batch), expected)

    plain = bake(keyed(model))
    export_onnx(plain, tmp_path / "model.onnx", contract, LABELS)
    export_coreml(plain, tmp_path / "model.mlpackage", contract, LABELS, precision="fp32")
    reference = TorchRuntime(plain)
    for runtime, limits in (
        (OnnxRuntime(tmp_path / "model.onnx"), ONNX_FP32),
        (CoreMLEvaluator(tmp_path / "model.mlpackage"), COREML_FP32),
    ):
        parity = measure_parity(reference, runtime, images(40), limits)
        assert parity.passed, parity


@pytest.mark.parametrize("mode", ["patch-embedding-head", "full"])
def test_both_heads_of_a_distilled_deit_are_trained(mode: str) -> None:
    vit, _ = build("deit_tiny_distilled_patch16_224")
    model = trained(vit, RecipeSettings.model_validate({"adaptation": mode}))
    for head in ("head", "head_dist"):
        assert not torch.equal(model.state_dict()[f"{head}.weight"], vit.state_dict()[f"{head}.weight"])


def test_a_new_patch_embedding_is_trained_in_full_next_to_separate_projections() -> None:
    vit, _ = build("eva02_base_patch16_clip_224")
    model = trained(vit, RecipeSettings(rank=2, reinitialise_patch_embedding=True))
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        *(f"blocks.0.attn.{part}_proj.lora_{side}.default.weight" for part in "qkv" for side in "AB"),
        *(
            f"{layer}.modules_to_save.default.{part}"
            for layer in ("head", "patch_embed.proj")
            for part in ("weight", "bias")
        ),
    }


ATTENTION, EMBEDDING = "linear layers for queries, keys and values", "a patch embedding by one convolution of the image"
REFUSED = [
    ("resnet18", {}, EMBEDDING),
    ("mixer_s32_224", {}, EMBEDDING),
    ("swin_tiny_patch4_window7_224", {}, EMBEDDING),
    ("vit_srelpos_small_patch16_224", {"depth": 1}, EMBEDDING),
    ("vit_tiny_r_s16_p8_224", {"depth": 1}, EMBEDDING),
    ("vit_small_patch16_18x2_224", {"depth": 1}, ATTENTION),
]


@pytest.mark.parametrize(("name", "arguments", "missing"), REFUSED)
def test_lora_on_anything_else_is_refused_with_what_is_missing(
    name: str, arguments: dict[str, Any], missing: str
) -> None:
    network = build_network(timm_architecture(name, LABELS, None, arguments))
    with pytest.raises(InputError, match=f"The recipe's adaptation 'lora' needs {missing}"):
        adapt(network, RecipeSettings())
