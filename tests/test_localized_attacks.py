"""N pixels and patches on a trained network: their sets, budgets and places, and that more of either fools more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.attack import Attack
from device_tests.attacks.patch import GreyPatch, PatchExamples, UniversalPatch, pasted, places
from device_tests.attacks.pixels import PixelEvolution, SparseSearch
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError

PIXEL_ATTACKS: list[Attack] = [SparseSearch(queries=150), PixelEvolution(queries=240, population=30)]
pixel_attacks = pytest.mark.parametrize("attack", PIXEL_ATTACKS, ids=lambda attack: attack.name)
CPU = torch.device("cpu")
QUARTER = Perturbation(Norm.PATCH, 0.25)


class Counting(nn.Module):
    """A model that counts how often it is asked about each image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += len(images)
        return self.model(images)


@pytest.fixture(scope="module")
def model(sample_images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A convolutional network on 1,500 real images; dropout shows whether it is put at rest."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 6, stride=2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        x, labels = floats(sample_images[0][:1500, None]), torch.from_numpy(sample_images[1][:1500].astype(np.int64))
        for step in range(120):
            part = slice(50 * (step % 30), 50 * (step % 30) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), labels[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def images(model: nn.Module, sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, torch.Tensor]:
    """The first 110 test images that the model gets right: uint8, and their labels."""
    clean, labels = sample_images[0][2000:2150, None], sample_images[1][2000:2150].astype(np.int64)
    with torch.no_grad():
        right = model(floats(clean)).argmax(1).numpy() == labels
    return clean[right][:110], torch.from_numpy(labels[right][:110])


@pytest.fixture(scope="module")
def examples(sample_images: tuple[np.ndarray, np.ndarray]) -> PatchExamples:
    return PatchExamples(sample_images[0][1500:1900, None], sample_images[1][1500:1900])


def floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(from_8bit(images))


def share_fooled(model: nn.Module, judged: np.ndarray, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(floats(judged)).argmax(1) != labels).float().mean())


@pixel_attacks
def test_pixel_attacks_change_that_many_pixels_and_more_fool_more(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack
) -> None:
    clean, labels = images[0][:60], images[1][:60]
    fooled = []
    for pixels in (1, 4, 16):
        size = Perturbation(Norm.L0, pixels)
        counting, heard = Counting(model), [0]

        def progress(asked: int, heard: list[int] = heard) -> None:
            heard[0] += asked

        x = floats(clean)
        candidates = attack.generate(counting, x, labels, epsilon=size.radius, seed=1, progress=progress)
        assert (candidates != x).any(dim=1).sum(dim=(1, 2)).max() <= pixels
        judged = size.to_8bit(candidates.numpy(), clean)
        # What was asked about is what is judged: rounding takes nothing away.
        assert np.abs(judged / 255 - candidates.numpy()).max() < 1e-6
        assert heard[0] == counting.asked <= attack.gradients_per_image * len(clean)
        fooled.append(share_fooled(model, judged, labels))
    assert fooled[1] > 0
    assert fooled[1] >= fooled[0] - 0.05
    assert fooled[2] > fooled[0] + 0.05


@pixel_attacks
def test_an_image_is_asked_about_no_more_once_it_is_fooled(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack
) -> None:
    clean, labels = images
    wrong = (labels + 1) % 10  # every image is wrong from the start, so that the first look is the last
    counting = Counting(model)
    attack.generate(counting, floats(clean), wrong, epsilon=1, seed=0)
    assert counting.asked < 0.3 * attack.gradients_per_image * len(clean)
    stubborn = Counting(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    nn.init.zeros_(stubborn.model[1].weight)
    stubborn.model[1].bias.data = torch.arange(10.0)
    attack.generate(stubborn, floats(clean[:2]), torch.tensor([9, 9]), epsilon=1, seed=0)
    assert stubborn.asked == 2 * attack.gradients_per_image


@pixel_attacks
def test_the_seed_alone_decides(model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack) -> None:
    x, labels = floats(images[0][:10]), images[1][:10]
    first = attack.generate(model, x, labels, epsilon=4, seed=5)
    torch.rand(3)
    assert torch.equal(first, attack.generate(model, x, labels, epsilon=4, seed=5))
    assert not torch.equal(first, attack.generate(model, x, labels, epsilon=4, seed=6))


@pixel_attacks
def test_as_many_pixels_as_there_are_and_colours_in_all_channels(attack: Attack) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x = torch.round(x * 255) / 255
    candidates = attack.generate(model, x, torch.zeros(3, dtype=torch.int64), epsilon=9, seed=0)
    assert candidates.shape == x.shape
    assert candidates.min() >= 0
    assert candidates.max() <= 1


def test_a_patch_lies_in_one_place_and_the_grey_control_in_the_same(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], examples: PatchExamples
) -> None:
    clean, labels = images
    side = QUARTER.side(28, 28)
    spots = places(len(clean), 28, 28, side, seed=2)
    assert spots.min() == 0
    assert spots.max() == 28 - side
    inside = pasted(torch.zeros(len(clean), 1, 28, 28), torch.ones(1, side, side), spots).bool()
    assert (inside.sum(dim=(1, 2, 3)) == side**2).all()
    patches = []
    for attack in (UniversalPatch(examples, steps=3), GreyPatch()):
        candidates = attack.generate(model, floats(clean), labels, epsilon=QUARTER.radius, seed=2)
        assert torch.equal(candidates[~inside], floats(clean)[~inside])
        patches.append(candidates[inside].view(len(clean), side, side))
        assert QUARTER.contains(QUARTER.to_8bit(candidates.numpy(), clean), clean).all()
    fitted, grey = patches
    assert (fitted == fitted[0]).all()
    assert (grey == 0.5).all()


def test_a_fitted_patch_fools_more_than_grey_and_a_large_one_more_than_a_small_one(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], examples: PatchExamples
) -> None:
    clean, labels = images
    heard = [0]

    def progress(done: int) -> None:
        heard[0] += done

    attack = UniversalPatch(examples, steps=60)
    fooled = {}
    for share in (0.02, 0.25):
        size = Perturbation(Norm.PATCH, share)
        for each in (attack, GreyPatch()):
            x = floats(clean)
            candidates = each.generate(model, x, labels, epsilon=size.radius, seed=0, progress=progress)
            fooled[share, each.name] = share_fooled(model, size.to_8bit(candidates.numpy(), clean), labels)
    assert heard[0] == 2 * attack.gradients_per_image * len(clean)
    # Over five draws of places and 114 images: 0.52 against 0.28.
    assert fooled[0.25, "patch"] > fooled[0.25, "grey-patch"] + 0.1
    assert fooled[0.25, "patch"] > fooled[0.02, "patch"] + 0.2


def test_a_patch_depends_on_its_seed_and_its_examples_alone(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], examples: PatchExamples
) -> None:
    attack = UniversalPatch(examples, steps=2)
    patch = attack.fit(model, 7, seed=1, device=CPU)
    assert patch.shape == (1, 7, 7)
    assert torch.equal(patch, attack.fit(model, 7, seed=1, device=CPU))
    assert not torch.equal(patch, attack.fit(model, 7, seed=2, device=CPU))
    fewer = UniversalPatch(PatchExamples(examples.images[:50], examples.labels[:50]), steps=2)
    assert fewer.description != attack.description
    assert UniversalPatch(PatchExamples(examples.images, examples.labels), steps=2).description == attack.description
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_patch_is_never_judged_on_its_own_examples(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], examples: PatchExamples
) -> None:
    mixed = np.concatenate([images[0][:3], examples.images[:2]])
    labels = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(InputError, match="2 of the judged images"):
        UniversalPatch(examples, steps=1).generate(model, floats(mixed), labels, epsilon=0.1, seed=0)
    with pytest.raises(InputError, match="same size"):
        UniversalPatch(examples, steps=1).generate(model, floats(mixed[:, :, :20]), labels, epsilon=0.1, seed=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SparseSearch(queries=0), lambda: PixelEvolution(queries=20, population=30),
        lambda: PixelEvolution(population=3),
        lambda: UniversalPatch(PatchExamples(np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1)), steps=0),
        lambda: PatchExamples(np.zeros((1, 1, 2, 2)), np.zeros(1)),
        lambda: PatchExamples(np.zeros((2, 1, 2, 2), np.uint8), np.zeros(1)),
    ],
)  # fmt: skip
def test_impossible_budgets_and_examples_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        build()
