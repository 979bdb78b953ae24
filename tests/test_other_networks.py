"""Networks other than ViTs as bases: built, saved, adapted, merged, folded, exported, and written from templates."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.export import ExportPlan, Templates, export
from exporters.parity import COREML_FP16, COREML_FP32, ONNX_FP32, measure_parity
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.adaptation import adapt, load_adapter, merge, save_adapter, trainable_parameters
from factory.base import Base, build_network, read_checkpoint, save_checkpoint, timm_architecture
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.data import Split, Splits
from factory.device_model import block_size
from factory.folding import bake, can_fold, fold_batch_norms
from factory.networks import running_statistics, traits
from factory.own_networks import NAMES, BottleneckResNet, Cnn6
from factory.progress import Progress
from factory.recipes.part import Trait
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.recipes.volumize import VolumizePart
from factory.train import train
from keys.errors import InputError

LABELS = ("bag", "boot", "coat", "shirt")
FULL = RecipeSettings.model_validate({"adaptation": "full"})
PARTIAL = RecipeSettings.model_validate({"adaptation": "patch-embedding-head"})


@dataclass(frozen=True)
class Kind:
    """A small network, and how many of its batch norms stay when those behind convolutions are folded."""

    name: str
    size: int
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    norms_left: int = 0


TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 32], "in_chans": 1}
KINDS = (
    Kind("resnet18", 64, {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [16, 16, 24, 32]}),
    Kind("resnet18_small", 28, TINY_RESNET),
    Kind("resnet50_small", 32, {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    Kind("bottleneck_resnet", 32, {"depth": 11}),
    Kind("convmixer_small", 28, {"patch_size": 7, "dim": 48, "depth": 2, "in_chans": 1}, 5),
    Kind("convmixer_small", 32, {"patch_size": 2, "dim": 16, "depth": 1}, 3),
    Kind("vgg11_small", 28, {"width": 8, "in_chans": 1}),
    Kind("cnn6", 28),
    Kind("cnn6_flat", 28),
)


def built(kind: Kind, seed: int = 1) -> Base:
    """Every parameter and every running statistic is random: nothing hides behind a zero or a one."""
    architecture = timm_architecture(kind.name, LABELS, kind.size, kind.arguments)
    network = build_network(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Base(architecture, network)


def keyed(base: Base, network: nn.Module | None = None, side: int | None = None, seed: int = 4) -> ImageClassifier:
    side = side or block_size(base, FULL)
    channels = base.architecture.contract.channels
    permutation = np.random.default_rng(seed).permutation(channels * side**2)
    shuffle = BlockShuffle(permutation, channels=channels, block_size=side)
    classifier = ImageClassifier(network or base.network, base.architecture.mean, base.architecture.std, shuffle)
    return classifier.eval()


def images(base: Base, count: int) -> np.ndarray:
    levels = np.random.default_rng(3).integers(0, 256, (count, *base.architecture.contract.shape))
    return levels.astype(np.float32) / 255


def few(splits: Splits, base: Base, count: int = 96) -> Split:
    """Real images at the base's size and channels."""
    taken, contract = splits.train.take(count), base.architecture.contract
    resized = nn.functional.interpolate(taken.images.float(), (contract.height, contract.width), mode="nearest")
    return Split(resized.to(torch.uint8).repeat(1, contract.channels, 1, 1), taken.labels % len(LABELS))


def trained(base: Base, recipe: RecipeSettings, split: Split, folder: Path) -> nn.Module:
    torch.manual_seed(5)
    network = adapt(base.network, recipe)
    settings = TrainingSettings(epochs=1, batch_size=32, learning_rate=1e-3, precision="fp32")
    train(
        keyed(base, network), split, split, settings, seed=0, name="a test", checkpoint=folder / "c.safetensors",
        progress=Progress(quiet=True),
    )  # fmt: skip
    return network.eval()


def ids(kind: Kind) -> str:
    return f"{kind.name}, {kind.size} px"


# ---- bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_a_base_comes_back_from_its_checkpoint(kind: Kind, tmp_path: Path) -> None:
    base = built(kind)
    save_checkpoint(base, tmp_path / "base.safetensors")
    again = read_checkpoint(tmp_path / "base.safetensors")
    assert again.architecture == base.architecture
    assert again.digest == base.digest
    assert base.architecture.contract.height == kind.size
    batch = torch.from_numpy(images(base, 3))
    with torch.no_grad():
        assert torch.equal(again.network(batch), base.network(batch))
    # A statistic is part of what a base is.
    statistics = running_statistics(base.network)
    if statistics:
        next(iter(statistics.values())).add_(1e-3)
        assert Base(base.architecture, base.network).digest != again.digest


def test_the_networks_of_the_conformity_paper_are_those_of_its_table() -> None:
    convolutions = [m for m in Cnn6().modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convolutions] == [(n, (5, 5)) for n in (32, 32, 64, 64, 128, 128)]
    assert [m.out_features for m in Cnn6().modules() if isinstance(m, nn.Linear)] == [512, 64, 10]
    deep = BottleneckResNet()
    layers = [
        m for name, m in deep.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]
    # The two fully connected layers take the place of the one that the name counts.
    assert len(layers) - 1 == 110
    assert [len(stage) for stage in (deep.layer1, deep.layer2, deep.layer3)] == [12, 12, 12]
    with pytest.raises(InputError, match=r"the depth must be 9n \+ 2 .* not 21"):
        build_network(timm_architecture("bottleneck_resnet", LABELS, 32, {"depth": 21}))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_ours_has_no_pretrained_weights(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no pre-trained weights"):
        build_network(timm_architecture(name, LABELS, None), pretrained=True)


def test_images_that_do_not_suit_are_refused() -> None:
    with pytest.raises(InputError, match="Base 'vgg11_small' does not take 3×8×8 images: "):
        build_network(timm_architecture("vgg11_small", LABELS, 8))
    with pytest.raises(InputError, match="Patches of 7 pixels do not tile images of 32×32"):
        build_network(timm_architecture("convmixer_small", LABELS, 32, {"patch_size": 7}))


def test_blocks_are_patches_or_four_pixels() -> None:
    assert block_size(built(KINDS[1]), FULL) == 4
    assert block_size(built(KINDS[4]), FULL) == 7
    base = built(Kind("resnet18_small", 30, TINY_RESNET))
    with pytest.raises(InputError, match="has no patches, so that blocks are of 4 pixels unless"):
        block_size(base, FULL)
    assert block_size(base, FULL.model_copy(update={"block_size": 5})) == 5
    # What cuts patches of its own asks for no blocks.
    assert block_size(base, FULL.model_copy(update={"transform": VolumizePart(patch_size=15)})) == 15


def test_what_each_network_has() -> None:
    found = {kind.name: traits(built(kind).network) for kind in KINDS}
    assert found.pop("convmixer_small") == {Trait.IMAGES, Trait.PATCH_EMBEDDING}
    assert set(found.values()) == {frozenset({Trait.IMAGES})}
    for recipe, name in ((RecipeSettings(), "lora"), (PARTIAL, "patch-embedding-head")):
        with pytest.raises(InputError, match=f"The recipe's adaptation '{name}' needs a patch embedding by one conv"):
            adapt(built(KINDS[1]).network, recipe)
    with pytest.raises(InputError, match="'lora' needs linear layers for queries, keys and values"):
        adapt(built(KINDS[4]).network, RecipeSettings())


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "recipe"), [*((kind, FULL) for kind in KINDS), (KINDS[4], PARTIAL)],
    ids=[*(ids(kind) for kind in KINDS), "convmixer, patch embedding and head"],
)  # fmt: skip
def test_a_trained_model_comes_back_bit_for_bit(
    kind: Kind, recipe: RecipeSettings, tiny_splits: Splits, tmp_path: Path
) -> None:
    base = built(kind)
    split = few(tiny_splits, base)
    network = trained(base, recipe, split, tmp_path)
    save_adapter(network, tmp_path / "adapter")
    loaded = load_adapter(base.network, recipe, tmp_path / "adapter")
    before, after, plain = network.state_dict(), loaded.state_dict(), merge(network).state_dict()
    assert before.keys() == after.keys() == plain.keys()
    assert all(torch.equal(before[name], after[name]) and torch.equal(before[name], plain[name]) for name in before)
    batch = split.images.float() / 255
    with torch.no_grad():
        assert torch.equal(keyed(base, network)(batch), keyed(base, loaded)(batch))
        assert not torch.equal(keyed(base, network)(batch), keyed(base)(batch))
    moved = {name for name, tensor in base.network.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = set(running_statistics(network))
    if recipe is PARTIAL:
        assert moved == {f"{layer}.{part}" for layer in ("stem.0", "head") for part in ("weight", "bias")} | statistics
        assert trainable_parameters(network) == 49 * 48 + 48 + 48 * 4 + 4
    else:
        assert moved == set(before)
    if statistics:
        # Without its statistics it would be another model: an adapter that lacks them is refused.
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
        save_adapter(network, tmp_path / "without")
        with pytest.raises(InputError, match="has other parameters than the recipe trains"):
            load_adapter(base.network, recipe, tmp_path / "without")


def test_a_resumed_training_has_the_statistics_of_one_that_was_not_interrupted(
    tiny_splits: Splits, tmp_path: Path
) -> None:
    base = built(KINDS[1])
    split = few(tiny_splits, base)
    states: list[dict[str, Tensor]] = []
    for epochs in ((2,), (1, 2)):
        for until in epochs:  # in one go, and in two
            network = adapt(base.network, FULL)
            settings = TrainingSettings(epochs=2, batch_size=32, precision="fp32")
            progress = _Stops(after=until)
            try:
                train(
                    keyed(base, network), split, split, settings, seed=0, name="a test",
                    checkpoint=tmp_path / f"{len(epochs)}.safetensors", progress=progress,
                )  # fmt: skip
            except KeyboardInterrupt:
                assert until == 1
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_batch_of_one_image_is_refused_where_there_are_batch_norms(tiny_splits: Splits, tmp_path: Path) -> None:
    split = few(tiny_splits, built(KINDS[1]), 33)
    for kind, refused in ((KINDS[1], True), (KINDS[7], False)):
        base = built(kind)
        network = adapt(base.network, FULL)
        settings = TrainingSettings(epochs=1, batch_size=32, precision="fp32")
        folder = tmp_path / kind.name
        folder.mkdir()
        with pytest.raises(InputError, match=r"With batches of 32, .* a single image") if refused else nullcontext():
            train(
                keyed(base, network), split, split, settings, seed=0, name="a test",
                checkpoint=folder / "c.safetensors", progress=Progress(quiet=True),
            )  # fmt: skip


class _Stops(Progress):
    """Interrupts a run in the first step after so many epochs of 96 images."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self.left = 96 * after

    def stage(self, name: str, *, total: int, unit: str, done: int = 0) -> Any:
        outer = self

        class Counting:
            def __enter__(self) -> Counting:
                outer.left -= done
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def advance(self, count: int = 1, note: str = "") -> None:
                outer.left -= count
                if outer.left < 0:
                    raise KeyboardInterrupt

        return Counting()


# ---- folding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_folding_changes_nothing_but_the_last_bits(kind: Kind) -> None:
    base = built(kind)
    model = keyed(base)
    baked = bake(model)
    batch = torch.from_numpy(images(base, 6))
    with torch.no_grad():
        torch.testing.assert_close(baked(batch), model(batch), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in baked.modules()) == kind.norms_left
    # Where patches are blocks, nothing of the shuffle and the normalisation is left.
    assert can_fold(model) == (not isinstance(baked, ImageClassifier)) == (kind.name == "convmixer_small")


def test_a_shuffle_of_larger_blocks_than_patches_stays() -> None:
    base = built(KINDS[4])
    model = keyed(base, side=14)
    baked = bake(model)
    assert isinstance(baked, ImageClassifier)
    batch = torch.from_numpy(images(base, 4))
    with torch.no_grad():
        torch.testing.assert_close(baked(batch), model(batch))


class Shared(nn.Module):
    """A convolution whose output is used twice, one that is called twice, and a norm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_of_one = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.two, self.norm_of_two = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.three, self.free = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = self.norm_of_one(y) + y
        y = self.norm_of_two(self.two(self.two(y)))
        return self.free(self.three(y)).flatten(1)


def test_a_norm_that_is_not_alone_behind_its_convolution_stays() -> None:
    network = Shared().eval()
    with torch.no_grad():
        network.norm_of_one.running_mean.add_(0.5)  # type: ignore[union-attr]
        network.norm_of_two.running_var.add_(0.5)  # type: ignore[union-attr]
    assert fold_batch_norms(network) is network


def test_a_network_that_cannot_be_traced_stays() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    network = Depends().eval()
    assert fold_batch_norms(network) is network


# ---- exports -----------------------------------------------------------------------------------------------------

FORMATS = ("onnx-fp32", "onnx-fp16", "onnx-int8", "coreml-fp32", "coreml-fp16", "coreml-int8")


EXPORTED = [
    kind for kind in KINDS if kind.size == 28 and kind.name != "cnn6_flat"
]  # one of each kind: a conversion takes seconds


@pytest.mark.parametrize("kind", EXPORTED, ids=ids)
def test_a_device_from_the_template_has_the_bytes_of_a_full_conversion(kind: Kind, tmp_path: Path) -> None:
    base = built(kind)
    plan = ExportPlan(base.architecture.contract, LABELS, FORMATS)
    told: list[str] = []
    templates = Templates(tmp_path / "templates", {"fleet_id": "0" * 16}, told.append)
    first = bake(keyed(base))
    other = built(kind, seed=2)
    second = bake(keyed(Base(base.architecture, other.network), seed=5))
    made: dict[str, Any] = {}
    for name, module, used in (("1", first, templates), ("2", second, templates), ("full", second, None)):
        (tmp_path / name).mkdir()
        made[name] = export(module, tmp_path / name, plan, used)
    assert told == []
    assert [made[name].from_template for name in made] == [False, True, False]
    assert made["2"].digests == made["full"].digests

    floats = images(base, 24)
    reference = TorchRuntime(second)
    for runtime, limits in (
        (OnnxRuntime(tmp_path / "2" / "model.onnx"), ONNX_FP32),
        (CoreMLEvaluator(tmp_path / "2" / "model-fp32.mlpackage"), COREML_FP32),
        (CoreMLEvaluator(tmp_path / "2" / "model.mlpackage"), COREML_FP16),
    ):
        parity = measure_parity(reference, runtime, floats, limits)
        assert parity.max_relative_difference <= parity.limit, parity
    expected = reference.logits(floats)
    for runtime in (
        OnnxRuntime(tmp_path / "2" / "model-int8.onnx"),
        CoreMLEvaluator(tmp_path / "2" / "model-int8.mlpackage"),
    ):
        difference = np.abs(runtime.logits(floats) - expected).max() / np.abs(expected).max()
        assert difference < 0.1
