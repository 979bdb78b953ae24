"""Boundaries: found in labels, localised by bisection, pushed and stitched; and the whole purifier on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from device_tests.attacks.pgd import PGD
from factory.base import EMBEDDED, read_checkpoint
from factory.classifier import ImageClassifier
from factory.data import load_splits
from factory.progress import Progress
from factory.purifier.aware_attack import PurifierBPDA, PurifierSquare
from factory.purifier.decision import Crossing, Decision, find_crossings, localise, stitch
from factory.purifier.likeness import psnr
from factory.purifier.purify import Purified, purify
from factory.purifier.settings import PurifierSettings
from factory.purifier.trajectory import Reconstructions, judged, reconstruct
from factory.settings import DataSettings
from keys.errors import CheckFailed, InputError

COUNT = 24


@dataclass(frozen=True, eq=False)
class Victims:
    """The shipped base with real test images, and the same images after PGD at 8/255."""

    model: ImageClassifier
    clean: Tensor
    attacked: Tensor
    labels: Tensor

    def right(self, images: Tensor) -> int:
        with torch.no_grad():
            return int((self.model(images).argmax(dim=1) == self.labels).sum())


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Victims:
    base = read_checkpoint(EMBEDDED["shipped"])
    architecture = base.architecture
    model = ImageClassifier(base.network, architecture.mean, architecture.std).eval()
    splits = load_splits(DataSettings(), architecture.contract, tmp_path_factory.mktemp("data"), Progress(quiet=True))
    taken = splits.test.take(COUNT)
    clean = taken.images.float() / 255
    attacked = PGD(10).generate(model, clean, taken.labels, epsilon=8 / 255, seed=0)
    return Victims(model, clean, torch.round(attacked * 255) / 255, taken.labels)


@pytest.fixture(scope="module")
def purified(victims: Victims) -> tuple[Purified, Purified]:
    """Purified clean images, and purified attacked ones."""
    return purify(victims.clean, victims.model), purify(victims.attacked, victims.model)


# What a trajectory says

FIDELITY = [18.0, 20.0, 24.0, 26.0, 28.0, 30.0]


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        ([3, 3, 5, 5, 7, 7], 7, Decision(5, (Crossing(3, 4),))),
        ([3, 3, 5, 5, 5, 5], 7, Decision(5, (Crossing(5, 6),))),  # noise that the prior never learned
        ([3, 3, 7, 7, 7, 7], 7, Decision(7, ())),  # blurred beginnings have no vote
        ([7, 7, 7, 5, 7, 7], 7, Decision(7, ())),  # one alone is not stable
        ([0, 0, 5, 5, 6, 6], 7, Decision(6, (Crossing(5, 6),))),  # equal votes: the later one
        ([0, 0, 7, 7, 7, 7], 7, Decision(7, ())),
    ],
)
def test_crossings_are_read_from_labels(labels: list[int], given: int, expected: Decision) -> None:
    assert find_crossings(labels, FIDELITY, given, recognisable=22.0, stable=2) == expected


def test_a_boundary_may_be_crossed_to_and_fro() -> None:
    labels, fidelity = [5, 5, 7, 5, 5, 5, 7], [25.0] * 7
    assert find_crossings(labels, fidelity, 7, 22.0, 2) == Decision(5, (Crossing(1, 2), Crossing(5, 6)))


def test_nothing_is_read_from_what_is_not_recognisable() -> None:
    assert find_crossings([5, 5, 5], [10.0, 11.0, 12.0], 7, 22.0, 2) == Decision(7, ())


# Localised, pushed, stitched


def brightness(images: Tensor) -> Tensor:
    """Class 1 where the mean is above 0.3; a boundary that is known."""
    return torch.stack([torch.full((len(images),), 0.3), images.mean(dim=(1, 2, 3))], dim=1)


def test_bisection_finds_a_boundary_that_is_known() -> None:
    drawn = torch.stack([torch.full((1, 1, 8, 8), value) for value in (0.1, 0.2, 0.5)])
    found = Reconstructions((10, 20, 30), drawn, torch.full((3, 1), 1e-3), {})
    given = torch.full((1, 1, 8, 8), 0.6)
    settings = PurifierSettings(bisections=12, push=0.5)
    decisions = [Decision(0, (Crossing(1, 2),))]
    (boundary,) = localise(given, judged(found, brightness), decisions, brightness, settings)
    assert boundary.on.mean() == pytest.approx(0.3, abs=1e-3)
    assert boundary.on.mean() <= 0.3  # still on the near side
    assert boundary.share == pytest.approx(1 / 3, abs=1e-3)
    # Half as far again, away from the given image.
    assert boundary.pushed.mean() == pytest.approx(0.3 - 0.5 * 0.3, abs=1e-3)


def test_a_stitched_image_is_what_the_pieces_agree_on(victims: Victims) -> None:
    picture = victims.clean[0]
    torch.testing.assert_close(stitch(picture.repeat(4, 1, 1, 1), 8), picture)
    assert torch.equal(stitch(picture[None], 8), picture)
    pieces = picture.repeat(5, 1, 1, 1)
    pieces[2, :, 4:12, 4:12] = 1 - pieces[2, :, 4:12, 4:12]
    apart = (stitch(pieces, 8) - picture).abs().max()
    assert apart < (pieces.mean(dim=0) - picture).abs().max() / 2


def test_images_smaller_than_a_patch_are_stitched_too() -> None:
    pieces = torch.rand(3, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    stitched = stitch(pieces, 8)
    assert stitched.shape == (3, 5, 9)
    assert (stitched >= pieces.amin(dim=0) - 1e-6).all()
    assert (stitched <= pieces.amax(dim=0) + 1e-6).all()


# The purifier


def test_attacked_images_are_put_right_and_clean_ones_stay_so(
    victims: Victims, purified: tuple[Purified, Purified]
) -> None:
    clean, attacked = purified
    before, after = victims.right(victims.attacked), victims.right(attacked.images)
    assert before < victims.right(victims.clean)  # or the attack did nothing
    assert after >= before + COUNT // 8
    assert victims.right(clean.images) >= victims.right(victims.clean) - 1


def test_labels_are_those_of_the_8bit_images(victims: Victims, purified: tuple[Purified, Purified]) -> None:
    for one in purified:
        with torch.no_grad():
            assert torch.equal(one.labels, victims.model(one.images).argmax(dim=1))
        levels = one.images * 255
        assert (levels - levels.round()).abs().max() < 1e-3
        for index, decision in enumerate(one.decisions):
            assert decision is not None
            assert decision.label == one.labels[index]


def test_without_a_crossing_an_image_comes_back_as_it_was_given(
    victims: Victims, purified: tuple[Purified, Purified]
) -> None:
    attacked = purified[1]
    crossed = [bool(decision and decision.crossings) for decision in attacked.decisions]
    assert any(crossed)
    assert not all(crossed)
    for index, changed in enumerate(crossed):
        assert torch.equal(attacked.images[index], victims.attacked[index]) != changed
    assert {boundary.image for boundary in attacked.boundaries} == {i for i, changed in enumerate(crossed) if changed}


def test_purified_images_still_show_the_picture(victims: Victims, purified: tuple[Purified, Purified]) -> None:
    changed = [index for index, decision in enumerate(purified[1].decisions) if decision and decision.crossings]
    assert psnr(purified[1].images[changed], victims.clean[changed]).min() > 18


def test_the_purifier_asks_for_no_gradient(victims: Victims) -> None:
    asked: list[bool] = []

    def classifier(images: Tensor) -> Tensor:
        asked.append(images.requires_grad or torch.is_grad_enabled())
        return victims.model(images)

    purify(victims.attacked[:2], classifier, PurifierSettings(steps=20, width=4))
    assert asked
    assert not any(asked)


def test_a_diverging_optimisation_is_one_error_that_names_the_images(victims: Victims) -> None:
    settings = PurifierSettings(steps=30, learning_rate=500.0, width=4)
    found = purify(victims.clean[:2], victims.model, settings)
    assert set(found.failures) == {0, 1}
    assert torch.equal(found.images, victims.clean[:2])
    with pytest.raises(CheckFailed, match=r"2 of 2 images diverged \(left: .*; right: .*lower the learning rate"):
        found.check(["left", "right"])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(1, 28, 28), "takes float images"),
        (torch.rand(1, 2, 28, 28), "1 or 3 channels"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), "takes float images"),
        (torch.full((1, 1, 28, 28), 2.0), "values in"),
        (torch.full((1, 1, 28, 28), torch.nan), "values in"),
        (torch.rand(1, 1, 4, 4), "pixels a side"),
    ],
)
def test_images_that_cannot_be_purified_are_refused(images: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        purify(images, brightness, PurifierSettings(steps=10))


@pytest.mark.parametrize(
    ("answer", "said"), [(torch.zeros(7), "give logits"), (torch.full((1, 3), torch.inf), "not finite")]
)
def test_a_classifier_that_gives_no_logits_is_refused(answer: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        purify(torch.rand(1, 1, 28, 28), lambda _: answer, PurifierSettings(steps=10))


# Attacks that know of it


def test_bpda_stays_in_its_ball_and_asks_a_new_seed_every_step(victims: Victims) -> None:
    settings = PurifierSettings(steps=20, width=4)
    attack = PurifierBPDA(settings, steps=2, samples=2)
    heard: list[int] = []
    images, labels = victims.clean[:2], victims.labels[:2]
    made = attack.generate(victims.model, images, labels, epsilon=8 / 255, seed=1, progress=heard.append)
    assert sum(heard) == attack.gradients_per_image * 2
    assert (made - images).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(made, attack.generate(victims.model, images, labels, epsilon=8 / 255, seed=1))
    assert not torch.equal(made, attack.generate(victims.model, images, labels, epsilon=8 / 255, seed=2))


def test_an_attack_on_the_trajectory_raises_the_loss_of_its_reconstructions(victims: Victims) -> None:
    settings = PurifierSettings(steps=40, recognisable=15.0)
    images, labels = victims.clean[:4], victims.labels[:4]
    attack = PurifierBPDA(settings, steps=3, samples=1, trajectory=True)
    made = attack.generate(victims.model, images, labels, epsilon=8 / 255, seed=0)

    def loss(given: Tensor) -> float:
        logits = judged(reconstruct(given, settings), victims.model).logits[-2:]
        return float(functional.cross_entropy(logits.flatten(0, 1), labels.repeat(2)))

    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign() * 8 / 255
    assert loss(made) > loss((images + noise).clamp(0, 1))
    assert (made - images).abs().max() <= 8 / 255 + 1e-6


def test_square_asks_the_purified_classifier_and_stays_in_its_ball(victims: Victims) -> None:
    settings = PurifierSettings(steps=20, width=4)
    attack = PurifierSquare(settings, queries=8)
    heard: list[int] = []
    images, labels = victims.clean[:3], victims.labels[:3]
    made = attack.generate(victims.model, images, labels, epsilon=0.2, seed=1, progress=heard.append)
    assert 0 < sum(heard) <= 8 * 3
    assert (made - images).abs().max() <= 0.2 + 1e-6
    assert not torch.equal(made, images)
    assert torch.equal(made, attack.generate(victims.model, images, labels, epsilon=0.2, seed=1))


def test_a_checkpoint_of_the_whole_purifier_is_used(victims: Victims, tmp_path: Path) -> None:
    settings, path = PurifierSettings(steps=30, width=4), tmp_path / "purify.safetensors"
    first = purify(victims.attacked[:2], victims.model, settings, checkpoint=path)
    heard: list[int] = []
    again = purify(victims.attacked[:2], victims.model, settings, checkpoint=path, advance=heard.append)
    assert heard == [60]
    assert torch.equal(first.images, again.images)
