"""Bit flips and format-preserving encryption: against the source's steps, folded, exported, and under templates."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from device_tests.attacks.pgd import PGD
from exporters.adapter.adapter_file import ADAPTER_NAME, read_adapter
from exporters.export import ExportPlan, Templates, export
from exporters.formats import FORMATS
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.adaptation import adapt
from factory.adapter_package import export_adapter_package, export_base_package
from factory.base import Base
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.folding import bake
from factory.keyed_transforms.bit_flip import BitFlip
from factory.keyed_transforms.format_preserving import FormatPreserving
from factory.keyed_transforms.neutral import neutral
from factory.keyed_transforms.places import (
    CHOICE_OF_MEMBER,
    ENCRYPTED_PLACES,
    ENCRYPTION_TABLE,
    FLIPPED_PLACES,
    keyed_half,
    keyed_order,
)
from factory.packaging import Identity, export_package
from factory.progress import Progress
from factory.recipes.bit_flip import BitFlipPart
from factory.recipes.block_shuffle import BlockShufflePart
from factory.recipes.format_preserving import FormatPreservingPart
from factory.recipes.recipe import RecipeSettings
from factory.settings import FleetSettings, parse
from factory.vits import KeyedVit
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError
from keys.permutation import permutation

KEY = fixed_guess("device")
PURPOSES = (FLIPPED_PLACES, ENCRYPTED_PLACES, ENCRYPTION_TABLE, CHOICE_OF_MEMBER)
PARTS = [
    BitFlipPart(), BitFlipPart(shuffle=True), FormatPreservingPart(), FormatPreservingPart(shuffle=True),
    FormatPreservingPart(codes=1000), FormatPreservingPart(codes=1000, shuffle=True),
]  # fmt: skip


def name_of(part: BitFlipPart | FormatPreservingPart) -> str:
    return "-".join(str(value) for value in part.model_dump().values())


@pytest.fixture(scope="module")
def grey(sample_images: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """16 real images float32 N×1×28×28 in [0, 1], of 8 bits."""
    return torch.from_numpy(sample_images[0][:16, None]).float() / 255


def built(part: BitFlipPart | FormatPreservingPart, m: int, channels: int = 1, key: DeviceKey = KEY) -> nn.Module:
    side = 28 if 28 % m == 0 else 4 * m
    transform = part.build(key, (channels, side, side), m)
    assert transform is not None
    return transform


def literal(block: list[int], part: BitFlipPart | FormatPreservingPart) -> list[float]:
    """One flattened block of 8-bit values by the source's steps, value by value, to [0, 1]."""
    n = len(block)
    shuffled = [block[place] for place in permutation(KEY, n)] if part.shuffle else block
    if isinstance(part, BitFlipPart):
        chosen = set(keyed_half(KEY, n, FLIPPED_PLACES).tolist())
        return [(255 - value if place in chosen else value) / 255 for place, value in enumerate(shuffled)]
    chosen = set(keyed_half(KEY, n, ENCRYPTED_PLACES).tolist())
    table = keyed_order(KEY, part.codes, ENCRYPTION_TABLE)
    encrypted = [int(table[value]) if place in chosen else value for place, value in enumerate(block)]
    order = permutation(KEY, n) if part.shuffle else range(n)
    return [encrypted[place] / (part.codes - 1) for place in order]


# What the key decides


def test_every_choice_has_a_subkey_of_its_own() -> None:
    orders = [permutation(KEY, 256), *(keyed_order(KEY, 256, purpose) for purpose in PURPOSES)]
    assert len({tuple(order.tolist()) for order in orders}) == 1 + len(PURPOSES)
    # 256 values agree by chance in one place on average.
    assert all((first == second).sum() < 9 for i, first in enumerate(orders) for second in orders[:i])


def test_known_answers_so_that_no_key_comes_to_mean_another_model() -> None:
    text = "".join(str(keyed_order(KEY, 256, purpose).tolist()) for purpose in PURPOSES)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "f4f9b13e69a608b7174a6aab478c44f681b71b6e5cf95845bc348ee669d3be42"
    )
    assert keyed_half(KEY, 8, FLIPPED_PLACES).tolist() == [0, 1, 3, 6]


@pytest.mark.parametrize("n", [1, 2, 49, 48])
def test_the_key_picks_half_of_the_places(n: int) -> None:
    half = keyed_half(KEY, n, FLIPPED_PLACES)
    assert len(set(half.tolist())) == len(half) == n // 2
    assert all(0 <= place < n for place in half)


def test_every_place_is_picked_half_of_the_time() -> None:
    counts = np.zeros(16)
    for index in range(400):
        counts[keyed_half(fixed_guess(f"guess-{index}"), 16, FLIPPED_PLACES)] += 1
    # Binomial(400, ½) has a standard deviation of 10; the keys are fixed, so that this cannot fail by chance.
    assert np.all(np.abs(counts - 200) < 50)


def test_without_a_key_nothing_is_done() -> None:
    assert all(part.build(None, (1, 28, 28), 7) is None for part in PARTS)


# What is done


@pytest.mark.parametrize("part", PARTS, ids=name_of)
@pytest.mark.parametrize(("m", "channels"), [(2, 1), (7, 1), (4, 3)])
def test_a_block_is_what_the_steps_give(part: BitFlipPart | FormatPreservingPart, m: int, channels: int) -> None:
    transform = built(part, m, channels)
    blocks = np.random.default_rng(m).integers(0, 256, (5, channels, m, m))
    images = torch.from_numpy(blocks).float() / 255
    # A transform takes whole images of any number of blocks; one block is an image, too.
    found = transform(images).flatten(1).numpy()
    wanted = np.array([literal(block.reshape(-1).tolist(), part) for block in blocks])
    assert np.abs(found - wanted).max() <= 2e-7
    tiled = transform(images.repeat(1, 1, 2, 3))
    assert torch.equal(tiled, transform(images).repeat(1, 1, 2, 3))


@pytest.mark.parametrize("part", PARTS, ids=name_of)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 7]))
def test_it_is_a_bijection_of_8_bit_images(part: BitFlipPart | FormatPreservingPart, seed: int, m: int) -> None:
    """Two images that differ in one value differ in one value afterwards, so no two give the same."""
    generator = np.random.default_rng(seed)
    transform = built(part, m, key=fixed_guess(f"key-{seed}"))
    values = m * m
    place = int(generator.integers(values))
    images = torch.from_numpy(generator.integers(0, 256, values)).repeat(256, 1)
    images[:, place] = torch.arange(256)
    found = transform(images.view(256, 1, m, m).float() / 255).flatten(1)
    differs = (found != found[0]).any(0)
    assert int(differs.sum()) == 1
    assert len(found[:, differs].unique()) == 256
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_flipping_twice_changes_nothing(grey: Tensor) -> None:
    transform = built(BitFlipPart(), 7)
    assert float((transform(transform(grey)) - grey).abs().max()) <= 1e-7
    assert not torch.equal(transform(grey), grey)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_levels_survive_in_float16_and_not_in_bfloat16(kind: torch.dtype) -> None:
    """k/255 rounded, times 255 rounded, is nearest to k while the type keeps 10 bits or more; bfloat16 keeps 8."""
    exact = torch.arange(256)
    found = torch.floor((exact.to(kind) / 255) * 255 + 0.5).long()
    if kind == torch.bfloat16:
        assert not torch.equal(found, exact)
    else:
        assert torch.equal(found, exact)


def test_levels_survive_where_core_ml_scales_pixels_in_float16() -> None:
    """The image is an 8-bit number that is multiplied by 1/255, itself rounded to float16."""
    level = np.arange(256, dtype=np.float16)
    value = level * np.float16(1 / 255)
    assert np.array_equal(np.floor(value * np.float16(255) + np.float16(0.5)).astype(int), np.arange(256))


def test_the_gradient_leads_to_the_best_level_of_the_table(grey: Tensor) -> None:
    transform = built(FormatPreservingPart(), 7)
    assert isinstance(transform, FormatPreserving)
    weight = torch.randn(grey.shape, generator=torch.Generator().manual_seed(1))
    images = grey.clone().requires_grad_()
    answers = transform(images)
    with torch.no_grad():
        assert torch.equal(answers, transform(grey))
    (found,) = torch.autograd.grad((answers * weight).sum(), images)
    # 24 of 49 places are encrypted; of the others the gradient is the plain one.
    assert float((found == weight).float().mean()) == pytest.approx(25 / 49, abs=0.01)
    # Every value by itself, to the level where the sum is largest: that is where the gradient pointed.
    levels = torch.arange(-8, 9).view(-1, 1, 1, 1, 1) / 255
    with torch.no_grad():
        near = (grey + levels).clamp(0, 1)
        gains = torch.stack([transform(one) for one in near]) * weight
    way = ((near.gather(0, gains.argmax(0, keepdim=True))[0] - grey) * 255).round()
    encrypted = found != weight
    assert torch.equal(found[encrypted].sign(), way[encrypted].sign())


def test_attacks_that_follow_the_gradient_undo_the_encryption(tiny_base: Base, grey: Tensor) -> None:
    """The same attack with a zero in place of the table's slope is weaker: the canary of a masked gradient."""
    model = classifier(tiny_base, FormatPreservingPart(), 7).eval()
    with torch.no_grad():
        labels = model(grey).argmax(1)
    candidates = PGD(10).generate(model, grey, labels, epsilon=8 / 255, seed=0)
    images = grey.clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), images)
    assert float((slope == 0).float().mean()) < 0.05
    with torch.no_grad():
        kept = (model(candidates).argmax(1) == labels).float().mean()
        noise = (grey + (torch.rand(grey.shape) - 0.5).sign() * 8 / 255).clamp(0, 1)
        noisy = (model(noise).argmax(1) == labels).float().mean()
    assert kept < noisy


# Folding


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("m", [7, 1])
def test_bit_flips_fold_exactly(tiny_base: Base, grey: Tensor, m: int, shuffle: bool) -> None:
    model = classifier(tiny_base, BitFlipPart(shuffle=shuffle), m)
    double = model.double()
    folded = bake(double)
    assert isinstance(folded, KeyedVit)
    with torch.no_grad():
        difference = float((folded(grey.double()) - double(grey.double())).abs().max())
    assert difference <= 1e-10


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 3]))
def test_the_fold_of_a_projection_is_exact(seed: int, m: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    projection = nn.Conv2d(channels, 5, 6, 6).double()
    flip = BitFlipPart().build(fixed_guess(f"key-{seed}"), (channels, 12, 12), m)
    assert flip is not None
    images = torch.rand(4, channels, 12, 12, dtype=torch.float64, generator=generator)
    folded = nn.Conv2d(channels, 5, 6, 6).double()
    with torch.no_grad():
        assert projection.bias is not None
        weight, bias = flip.folded(projection.weight, projection.bias)
        folded.weight.copy_(weight)
        assert folded.bias is not None
        folded.bias.copy_(bias)
        assert float((folded(images) - projection(flip.double()(images))).abs().max()) <= 1e-13


@pytest.mark.parametrize("part", [BitFlipPart(), FormatPreservingPart()], ids=name_of)
@pytest.mark.parametrize("m", [4, 14])
def test_what_cannot_be_folded_stays_in_the_graph(
    tiny_base: Base, grey: Tensor, part: BitFlipPart | FormatPreservingPart, m: int
) -> None:
    model = classifier(tiny_base, part, m)
    baked = bake(model)
    assert isinstance(baked, ImageClassifier)
    with torch.no_grad():
        assert torch.allclose(baked(grey), model(grey), atol=1e-5)


def classifier(base: Base, part: BitFlipPart | FormatPreservingPart, m: int, key: DeviceKey = KEY) -> ImageClassifier:
    """An adapted classifier whose adapter is not zero."""
    torch.manual_seed(1)
    network = adapt(base.network, RecipeSettings(rank=4))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    transform = part.build(key, base.architecture.contract.shape, m)
    return ImageClassifier(network, base.architecture.mean, base.architecture.std, transform).eval()


# On devices


@pytest.mark.parametrize("part", [BitFlipPart(shuffle=True), FormatPreservingPart(shuffle=True)], ids=name_of)
def test_packages_answer_alike_and_come_from_a_template(
    tiny_base: Base, grey: Tensor, part: BitFlipPart | FormatPreservingPart, tmp_path: Path
) -> None:
    told: list[str] = []
    templates = Templates(tmp_path / "templates", {"fleet_id": "0" * 16}, told.append)
    formats = ("onnx-fp32", "onnx-fp16", "coreml-fp16")
    plan = ExportPlan(tiny_base.architecture.contract, tiny_base.architecture.labels, formats)
    other, module = (bake(classifier(tiny_base, part, 14, fixed_guess(f"device-{index}"))) for index in (1, 2))
    for name in ("1", "2", "full"):
        (tmp_path / name).mkdir()
    export(other, tmp_path / "1", plan, templates)
    done = export(module, tmp_path / "2", plan, templates)
    assert done.from_template
    assert dict(export(module, tmp_path / "full", plan, None).digests) == dict(done.digests)
    assert told == []
    reference = TorchRuntime(module).logits(grey.numpy())
    for name in formats:
        path = tmp_path / "2" / FORMATS[name].path
        runtime = OnnxRuntime(path) if path.suffix == ".onnx" else CoreMLEvaluator(path)
        difference = np.abs(runtime.logits(grey.numpy()) - reference).max() / np.abs(reference).max()
        assert difference <= FORMATS[name].limits.difference
        # Through another device's key the answers are others, so the comparison says something.
        assert np.abs(TorchRuntime(other).logits(grey.numpy()) - reference).max() > 0.1 * np.abs(reference).max()


@pytest.mark.parametrize(
    ("part", "m"), [(BitFlipPart(shuffle=True), 7), (BitFlipPart(), 14), (FormatPreservingPart(shuffle=True), 7)]
)
def test_an_adapter_package_carries_the_transform(
    tiny_base: Base, grey: Tensor, part: BitFlipPart | FormatPreservingPart, m: int, tmp_path: Path
) -> None:
    """Folded into the patch embedding, or as tensors of its own beside the adapted layers."""
    recipe, quiet = RecipeSettings(rank=4, block_size=m, transform=part), Progress(quiet=True)
    created, images = datetime(2030, 1, 31, tzinfo=UTC), (grey * 255).to(torch.uint8).numpy()
    shared, full = tmp_path / "base", tmp_path / "full"
    model = classifier(tiny_base, part, m)
    export_base_package(
        tiny_base, recipe, "0" * 16, images, shared, quiet, created=created, formats=("onnx-fp32",)
    )  # fmt: skip
    plain = ImageClassifier(tiny_base.network, tiny_base.architecture.mean, tiny_base.architecture.std).eval()
    unadapted = OnnxRuntime(shared / "model.onnx").logits(grey.numpy())
    assert np.abs(unadapted - TorchRuntime(plain).logits(grey.numpy())).max() < 1e-4 * np.abs(unadapted).max()
    identity = Identity("camera-01", 1, "0" * 16, "b" * 64, recipe.model_dump(mode="json"), created)
    plan = ExportPlan(tiny_base.architecture.contract, tiny_base.architecture.labels, ("onnx-fp32",))
    export_package(bake(model), tiny_base, identity, images, full, quiet, plan)
    manifest = export_adapter_package(model, tiny_base, recipe, shared, full, tmp_path / "adapter", quiet)
    parity = manifest.evidence["parity_with_full_package"]
    assert isinstance(parity, dict)
    assert parity["passed"]
    stored = read_adapter((tmp_path / "adapter" / ADAPTER_NAME).read_bytes())
    assert any(name.startswith("transform.") for name in stored) == isinstance(bake(model), ImageClassifier)
    other = recipe.model_copy(update={"transform": BlockShufflePart()})
    with pytest.raises(InputError, match="another transform than the device"):
        export_adapter_package(model, tiny_base, other, shared, full, tmp_path / "refused", quiet)


@pytest.mark.parametrize("part", [*PARTS[:4], "shuffle"], ids=str)
def test_what_a_public_base_has_in_its_place_changes_nothing(
    grey: Tensor, part: BitFlipPart | FormatPreservingPart | str
) -> None:
    keyed = BlockShuffle(permutation(KEY, 49), channels=1, block_size=7) if isinstance(part, str) else built(part, 7)
    plain = neutral(keyed)
    shapes = {name: (value.shape, value.dtype) for name, value in plain.state_dict().items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in keyed.state_dict().items()}
    assert torch.allclose(plain(grey), grey, atol=1e-7)
    assert not torch.allclose(keyed(grey), grey, atol=0.1)


def test_a_transform_that_cannot_be_left_out_is_refused() -> None:
    for transform in (built(FormatPreservingPart(codes=1000), 7), nn.Identity()):
        with pytest.raises(InputError, match="send full packages"):
            neutral(transform)
    recipe = {"transform": {"kind": "format-preserving", "codes": 1000}}
    with pytest.raises(InputError, match="256 codes, not 1000"):
        parse(FleetSettings, {"export": {"adapters": True}, "recipe": recipe}, "the file")


# What is refused


@pytest.mark.parametrize("places", [[0, 0], [-1], [4]])
def test_places_outside_of_a_block_are_refused(places: list[int]) -> None:
    with pytest.raises(InputError, match="different numbers from 0 to 3"):
        BitFlip(np.array(places), channels=1, block_size=2)
    with pytest.raises(InputError, match="different numbers from 0 to 3"):
        FormatPreserving(np.array(places), np.arange(256), channels=1, block_size=2)


@pytest.mark.parametrize("codes", [np.arange(255), np.zeros(256, np.int64), np.arange(1, 1001)])
def test_what_is_no_table_is_refused(codes: np.ndarray) -> None:
    with pytest.raises(InputError, match="permutation of 256 or of 1000"):
        FormatPreserving(np.arange(2), codes, channels=1, block_size=2)


def test_what_is_no_shuffle_and_a_block_size_that_does_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="needs 4 values"):
        FormatPreserving(np.arange(2), np.arange(256), channels=1, block_size=2, permutation=np.arange(3))
    for part in PARTS:
        with pytest.raises(InputError, match="Block size 5 does not divide"):
            part.build(KEY, (1, 28, 28), 5)


def test_the_recipe_names_them_and_what_was_made_before_keeps_its_name() -> None:
    recipe = RecipeSettings.model_validate({"transform": {"kind": "bit-flip", "shuffle": True}})
    assert recipe.transform == BitFlipPart(shuffle=True)
    assert recipe.model_dump(mode="json")["transform"] == {"kind": "bit-flip", "shuffle": True}
    assert "transform" not in RecipeSettings().model_dump(mode="json")
