"""Merged and unmerged, folded and unfolded: one function, in float64 to 1e-10 and in float32 to 1e-5."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from factory.adaptation import adapt, merge
from factory.base import Architecture, Base, build_network, contract_for, timm_architecture
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.folding import bake, can_fold, fold
from factory.recipes.recipe import RecipeSettings
from keys.permutation import permutation

ROUNDING_64 = 1e-10
ROUNDING_32 = 1e-5


@pytest.fixture(scope="module")
def grey(sample_images: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """64 real images float32 N×1×28×28 in [0, 1]."""
    return torch.from_numpy(sample_images[0][:64, None]).float() / 255


@pytest.fixture(scope="module")
def rgb(sample_images: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """32 colour images, each of three real ones, so that its channels differ."""
    return torch.from_numpy(sample_images[0][:96]).reshape(32, 3, 28, 28).float() / 255


def rgb_base(patch: int) -> Base:
    """A small colour base with statistics that differ from channel to channel."""
    arguments = {"img_size": 28, "patch_size": patch, "embed_dim": 32, "depth": 2, "num_heads": 2}
    known = timm_architecture("vit_tiny_patch16_224", tuple("abcdefgh"), None, arguments)
    architecture = Architecture(
        known.name, (0.49, 0.42, 0.31), (0.15, 0.22, 0.34), contract_for(3, 28), known.labels, arguments
    )
    return Base(architecture, build_network(architecture, seed=3))


def keyed(base: Base, m: int | None, recipe: RecipeSettings | None = None) -> ImageClassifier:
    """An adapted classifier whose adapter is not zero, as after training; no shuffle for None."""
    model = adapt(base.network, recipe or RecipeSettings(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(m or 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    shuffle, channels = None, base.architecture.contract.channels
    if m is not None:
        values = permutation(bytes([m]) * 32, channels * m * m)
        shuffle = BlockShuffle(values, channels=channels, block_size=m)
    return ImageClassifier(model, base.architecture.mean, base.architecture.std, shuffle).eval()


def in_double(model: nn.Module) -> nn.Module:
    """A copy whose weights and buffers are float64 (the permutation stays what it is)."""
    model = copy.deepcopy(model).double()
    kinds = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]}
    assert kinds <= {torch.float64, torch.int64}
    return model


@torch.no_grad()
def check_equal(model: ImageClassifier, images: Tensor) -> nn.Module:
    """Compare a classifier with its baked form in both precisions; return the baked one (float32)."""
    double = in_double(model)
    assert isinstance(double, ImageClassifier)
    exact, baked = double(images.double()), bake(double)(images.double())
    assert exact.dtype == baked.dtype == torch.float64
    assert float((baked - exact).abs().max()) <= ROUNDING_64
    plain, single = bake(model), model(images)
    assert single.dtype == torch.float32
    # What float32 loses is far above the float64 limit, so the comparison above was truly made in float64.
    assert float((single.double() - exact).abs().max()) > 10 * ROUNDING_64
    assert float((plain(images) - single).abs().max()) <= ROUNDING_32 * float(single.abs().max())
    return plain


def check_merged(model: ImageClassifier, images: Tensor) -> None:
    """Compare a classifier with itself after nothing but the merge."""
    for precision, limit in ((torch.float64, ROUNDING_64), (torch.float32, ROUNDING_32)):
        one = in_double(model) if precision == torch.float64 else model
        assert isinstance(one, ImageClassifier)
        merged = ImageClassifier(
            merge(one.network), one.mean.flatten().tolist(), one.std.flatten().tolist(), one.transform
        )
        with torch.no_grad():
            before, after = one(images.to(precision)), merged(images.to(precision))
        assert before.dtype == after.dtype == precision
        largest = 1.0 if precision == torch.float64 else float(before.abs().max())
        assert float((after - before).abs().max()) <= limit * largest


def test_the_patch_size_as_block_folds_on_the_trained_base(tiny_base: Base, grey: Tensor) -> None:
    model = keyed(tiny_base, 7)
    check_merged(model, grey)
    assert isinstance(check_equal(model, grey), VisionTransformer)


@pytest.mark.parametrize("m", [4, 14, 28])
def test_other_blocks_stay_a_gather_with_equal_results(tiny_base: Base, grey: Tensor, m: int) -> None:
    """M = 4 does not divide the patch of 7 pixels, 14 and 28 are larger."""
    model = keyed(tiny_base, m)
    check_merged(model, grey)
    plain = check_equal(model, grey)
    assert isinstance(plain, ImageClassifier)
    assert isinstance(plain.network, VisionTransformer)
    assert plain.transform is not None


@pytest.mark.parametrize(
    ("patch", "m", "folds"),
    [(14, 2, True), (14, 7, True), (14, 14, True), (4, 4, True), (4, 2, True), (14, 4, False), (4, 28, False)],
)
def test_colour_with_statistics_that_differ_by_channel(rgb: Tensor, patch: int, m: int, folds: bool) -> None:
    plain = check_equal(keyed(rgb_base(patch), m), rgb)
    assert isinstance(plain, VisionTransformer if folds else ImageClassifier)


@pytest.mark.parametrize("adaptation", ["full", "patch-embedding-head"])
def test_the_other_adaptations_fold_as_well(tiny_base: Base, grey: Tensor, adaptation: str) -> None:
    recipe = RecipeSettings.model_validate({"adaptation": adaptation})
    assert isinstance(check_equal(keyed(tiny_base, 7, recipe), grey), VisionTransformer)


def test_without_a_key_the_normalisation_alone_is_folded(rgb: Tensor) -> None:
    assert isinstance(check_equal(keyed(rgb_base(14), None), rgb), VisionTransformer)


def test_a_patch_embedding_without_bias_gets_one(rgb: Tensor) -> None:
    base = rgb_base(14)
    proj = base.network.patch_embed.proj
    assert isinstance(proj, nn.Conv2d)
    proj.register_parameter("bias", None)
    check_equal(keyed(base, 7), rgb)


def test_a_shuffle_that_reaches_over_patches_cannot_be_folded(tiny_base: Base) -> None:
    model = keyed(tiny_base, 14)
    merged = ImageClassifier(
        merge(model.network), tiny_base.architecture.mean, tiny_base.architecture.std, model.transform
    )
    assert not can_fold(merged)
    with pytest.raises(AssertionError):
        fold(merged)


def test_the_key_matters_on_real_images(tiny_base: Base, grey: Tensor) -> None:
    """Folding with another key gives another function, so the equalities above say something."""
    model = keyed(tiny_base, 7)
    other = BlockShuffle(permutation(bytes(32), 49), channels=1, block_size=7)
    changed = ImageClassifier(model.network, tiny_base.architecture.mean, tiny_base.architecture.std, other)
    with torch.no_grad():
        assert float((bake(changed)(grey) - model(grey)).abs().max()) > 0.05


def test_baking_leaves_the_classifier_as_it_was(tiny_base: Base) -> None:
    model = keyed(tiny_base, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = bake(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert not plain.training
