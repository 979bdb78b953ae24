"""Five regions: where they lie, attacks inside them, the averaged and the plain judgement; searching other orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.answers import margins
from device_tests.attacks.order_search import OrderSearch, displaced
from device_tests.attacks.patch import PatchExamples, UniversalPatch
from device_tests.attacks.pixels import SparseSearch
from device_tests.attacks.region_patch import RegionPatch
from device_tests.attacks.regions import Box, Region
from device_tests.evidence import Proportion
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.region_judgement import RegionJudgement, accuracy_of, judge_regions, robustness
from exporters.run_torch import TorchRuntime
from keys.errors import InputError

every_region = pytest.mark.parametrize("region", Region, ids=lambda region: region.value)


def floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(from_8bit(images))


@pytest.fixture(scope="module")
def model(sample_images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A small convolutional network on 1,000 real images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 6, stride=2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        x, labels = floats(sample_images[0][:1000, None]), torch.from_numpy(sample_images[1][:1000].astype(np.int64))
        for step in range(80):
            part = slice(50 * (step % 20), 50 * (step % 20) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), labels[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def images(sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sixty test images, uint8, and their labels."""
    return sample_images[0][2000:2060, None], sample_images[1][2000:2060].astype(np.int64)


# Where the regions lie


def test_the_quadrants_tile_the_image_and_the_centre_has_the_size_of_one() -> None:
    for height, width in ((32, 32), (28, 28), (9, 14), (2, 3)):
        covered = torch.zeros(height, width, dtype=torch.int64)
        for region in list(Region)[:4]:
            covered += region.box(height, width).mask(height, width)
        assert (covered == 1).all()
        centre = Region.CENTRE.box(height, width)
        assert (centre.height, centre.width) == (height // 2, width // 2)
    assert Region.CENTRE.box(32, 32) == Box(8, 8, 16, 16)
    assert Region.BOTTOM_LEFT.box(9, 14) == Box(4, 0, 5, 7)
    with pytest.raises(InputError, match="no quadrants"):
        Region.CENTRE.box(1, 8)


@every_region
def test_what_does_not_fit_into_a_quadrant_goes_to_the_centre(region: Region) -> None:
    assert region.holding(32, 32, 256) == region.box(32, 32)
    for pixels in (257, 512, 1000, 1024, 5000):
        box = region.holding(32, 32, pixels)
        assert box == Region.CENTRE.holding(32, 32, pixels)
        assert box.area >= min(pixels, 1024)
        assert abs(box.top - (32 - box.top - box.height)) <= 1
    assert region.holding(32, 32, 1024) == Box(0, 0, 32, 32)
    assert region.holding_square(32, 32, 16) == region.box(32, 32)
    assert region.holding_square(32, 32, 17) == Box(7, 7, 17, 17)
    with pytest.raises(InputError, match="does not fit"):
        region.holding_square(32, 32, 33)


# Attacks inside a region


@every_region
@pytest.mark.parametrize("places", ["drawn", "searched"])
def test_pixels_stay_in_their_region(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray], region: Region, places: str
) -> None:
    attack = SparseSearch(8, region, "drawn" if places == "drawn" else "searched")
    x, labels = floats(images[0][:20]), torch.from_numpy(images[1][:20])
    for pixels in (1, 30, 196, 250):
        found = attack.generate(model, x, labels, epsilon=pixels, seed=2)
        changed = (found != x).any(dim=1)
        inside = region.holding(28, 28, pixels).mask(28, 28)
        assert not changed[:, ~inside].any()
        assert changed.sum(dim=(1, 2)).max() <= pixels
        assert changed.any()


def test_five_attacks_in_one_centred_box_are_not_one_attack_five_times(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    x, labels = floats(images[0][:5]), torch.from_numpy(images[1][:5])
    found = [SparseSearch(1, region, "drawn").generate(model, x, labels, epsilon=250, seed=0) for region in Region]
    assert len({candidates.numpy().tobytes() for candidates in found}) == 5


def test_drawn_places_are_kept_and_their_colours_searched(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    x, labels = floats(images[0][:20]) * 0.5 + 0.25, torch.from_numpy(images[1][:20])
    # No colour of the image is a corner of the cube, so that every changed pixel shows.
    one, many = (
        SparseSearch(queries, Region.CENTRE, "drawn").generate(model, x, labels, epsilon=12, seed=4) != x
        for queries in (1, 60)
    )
    assert torch.equal(one, many)
    searched = SparseSearch(60, Region.CENTRE).generate(model, x, labels, epsilon=12, seed=4) != x
    assert not torch.equal(one, searched)


def test_an_attack_that_goes_on_lowers_the_margin_of_what_is_wrong_already(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    x, labels = floats(images[0]), torch.from_numpy(images[1])
    found = []
    for stops in (True, False):
        attack = SparseSearch(60, Region.CENTRE, stops=stops)
        with torch.no_grad():
            found.append(margins(model(attack.generate(model, x, labels, epsilon=25, seed=0)), labels))
        assert ("all queries" in attack.description) != stops
    stopped, spent = found
    # The same draws for both, so that the one that goes on goes on from where the other stopped.
    assert (spent <= stopped + 1e-5).all()
    assert (stopped < 0).sum() >= 5
    assert (spent < stopped - 0.05)[stopped < 0].float().mean() > 0.5


def test_the_search_without_a_region_is_what_it_was(model: nn.Module, images: tuple[np.ndarray, np.ndarray]) -> None:
    attack = SparseSearch(50)
    assert attack.name == "sparse-rs"
    assert attack.description == (
        "Sparse-RS, L0, at most 50 score queries of 8-bit images, corner colours, margin loss"
    )
    names = {SparseSearch(50, region, places).name for region in Region for places in ("drawn", "searched")}
    assert len(names) == 10


@every_region
def test_a_patch_lies_inside_its_region_and_its_control_at_the_same_place(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray], sample_images: tuple[np.ndarray, np.ndarray],
    region: Region,
) -> None:  # fmt: skip
    size = Perturbation(Norm.PATCH, 0.1)
    side = size.side(28, 28)
    examples = PatchExamples(sample_images[0][1000:1100, None], sample_images[1][1000:1100])
    fitted = UniversalPatch(examples, steps=2).fit(model, side, seed=0, device=torch.device("cpu"))
    x, labels = floats(images[0]), torch.from_numpy(images[1])
    changed = []
    for attack in (RegionPatch(fitted, region), RegionPatch.grey(1, side, region)):
        found = attack.generate(model, x, labels, epsilon=size.radius, seed=3)
        inside = region.box(28, 28).mask(28, 28)
        assert not (found != x).any(dim=1)[:, ~inside].any()
        assert size.contains(size.to_8bit(found.numpy(), images[0]), images[0]).all()
        changed.append((found != x).any(dim=(1, 2)))
    # A pixel may keep its value by chance, so the columns that both changed tell the place.
    assert (changed[0] & changed[1]).any(dim=1).all()
    wide = RegionPatch(torch.rand(1, 20, 20), region).generate(model, x, labels, epsilon=0.6, seed=0)
    assert not (wide != x)[:, :, :4].any()
    with pytest.raises(InputError, match="does not fit"):
        RegionPatch(torch.rand(1, 20, 20), region).generate(model, x, labels, epsilon=0.1, seed=0)


def test_a_patch_that_is_none_is_refused() -> None:
    for patch in (torch.rand(2, 3), torch.rand(1, 2, 3), torch.full((1, 2, 2), 1.5), torch.full((1, 2, 2), torch.nan)):
        with pytest.raises(InputError, match="A patch is float"):
            RegionPatch(patch, Region.CENTRE)


# The judgement


class Sums(nn.Module):
    """Logits are the image's own first pixels, so that an answer can be written by hand."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 20 * images.flatten(1)[:, :3]


def answers(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8).reshape(-1, 1, 1, 3)


def test_the_average_outvotes_one_broken_answer_and_the_worst_does_not() -> None:
    labels = np.array([0, 0, 1])
    clean = answers((200, 0, 0), (200, 0, 0), (200, 0, 0))
    kept, broken = (200, 0, 0), (90, 110, 0)
    attacked = {
        "a": answers(broken, broken, kept), "b": answers(kept, broken, kept), "c": answers(kept, broken, kept),
        "d": answers(kept, broken, kept), "e": answers(kept, broken, kept),
    }  # fmt: skip
    judged = judge_regions(TorchRuntime(Sums()), clean, attacked, labels)
    assert judged.clean.tolist() == [True, True, False]
    assert judged.averaged.tolist() == [True, False, False]
    assert judged.worst.tolist() == [False, False, False]
    assert judged.places["a"].tolist() == [False, False, False]
    assert judged.places["b"].tolist() == [True, False, False]
    averaged, worst = judged.answers["averaged"], judged.answers["worst of five"]
    assert accuracy_of(averaged) == Proportion(1, 3)
    assert robustness(judged.clean, averaged).difference == pytest.approx(-1 / 3)
    assert robustness(judged.clean, worst).difference == pytest.approx(-2 / 3)


def test_it_is_the_mean_of_the_softmax_and_no_vote() -> None:
    # Three regions of five are narrowly wrong, two surely right: a vote says wrong, the mean right.
    narrow, sure = (100, 103, 0), (250, 0, 0)
    attacked = {str(number): answers(narrow if number < 3 else sure) for number in range(5)}
    judged = judge_regions(TorchRuntime(Sums()), answers(sure), attacked, np.array([0]))
    assert sum(row[0] for row in judged.places.values()) == 2
    assert judged.averaged[0]


def test_the_worst_of_five_is_never_better_than_the_average_of_a_trained_network(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    size = Perturbation(Norm.L0, 12.0)
    x, labels = floats(images[0]), torch.from_numpy(images[1])
    attacked = {
        region.value: size.to_8bit(
            SparseSearch(40, region).generate(model, x, labels, epsilon=size.radius, seed=0).numpy(), images[0]
        )
        for region in Region
    }
    judged = judge_regions(TorchRuntime(model), images[0], attacked, images[1])
    assert judged.worst.sum() < judged.averaged.sum() < judged.clean.sum()
    assert all(judged.worst.sum() <= row.sum() for row in judged.places.values())


def test_unequal_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="other shapes"):
        judge_regions(TorchRuntime(Sums()), answers((1, 2, 3)), {}, np.array([0]))
    with pytest.raises(ValueError, match="other shapes"):
        judge_regions(TorchRuntime(Sums()), answers((1, 2, 3)), {"a": answers((1, 2, 3), (1, 2, 3))}, np.array([0]))
    none = np.zeros(3, dtype=bool)
    with pytest.raises(ValueError, match="no judgement"):
        RegionJudgement(none, {"a": none[:2]}, none)


# The order


def by_brightness(images: torch.Tensor) -> torch.Tensor:
    """The sixteen 7×7 patches by their mean, darkest first."""
    return nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 7).flatten(1).argsort(dim=1, stable=True)


def raster(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(16).expand(len(images), -1)


def test_an_order_search_moves_patches_where_the_order_depends_on_the_image(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    size = Perturbation(Norm.LINF, 8 / 255)
    x, labels = floats(images[0][:30]), torch.from_numpy(images[1][:30])
    with torch.no_grad():
        x, labels = x[model(x).argmax(1) == labels], labels[model(x).argmax(1) == labels]
    heard = [0]

    def progress(asked: int) -> None:
        heard[0] += asked

    moved = {}
    for order in (by_brightness, raster):
        attack = OrderSearch(order, (7, 7), order.__name__, queries=60)
        found = attack.generate(model, x, labels, epsilon=size.radius, seed=1, progress=progress)
        clean = torch.round(x * 255).to(torch.uint8).numpy()
        judged = floats(size.to_8bit(found.numpy(), clean))
        # What was searched is what is judged: rounding takes nothing away.
        assert torch.allclose(judged, found, atol=1e-6)
        moved[order.__name__] = float(displaced(order, x, judged).mean())
        assert torch.equal(found, attack.generate(model, x, labels, epsilon=size.radius, seed=1))
    assert heard[0] <= 2 * attack.gradients_per_image * len(x)
    # Flat corners of a bright and a dark image cannot all be exchanged, but many neighbours can.
    assert moved["by_brightness"] > 0.3
    assert moved["raster"] == 0


def test_an_order_search_takes_patches_that_tile_the_image(
    model: nn.Module, images: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(InputError, match="do not tile"):
        OrderSearch(raster, (5, 7)).generate(
            model, floats(images[0][:2]), torch.from_numpy(images[1][:2]), epsilon=0.1, seed=0
        )
    with pytest.raises(InputError, match="at least one query"):
        OrderSearch(raster, (7, 7), queries=0)
