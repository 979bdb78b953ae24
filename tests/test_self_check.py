"""The self-check: strong enough attacks pass, weak ones do not, and nothing unmeasured passes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.pgd import PGD
from device_tests.crafting import AdversarialSet, craft
from device_tests.evidence import Proportion
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.self_check import (
    StrongBudget,
    StrongResult,
    fooled_without_bound,
    run_strong,
    self_check,
    strong_key,
)
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from factory.verification import AttackedSource, weak_sources

BALL = Perturbation(Norm.LINF, 16 / 255)
BUDGET = StrongBudget(steps=10, targets=2, images=60)


class Idle:
    """An attack that proposes the clean images: the weakest there is."""

    name = "idle"
    description = "nothing at all"
    gradients_per_image = 0
    norm = Norm.LINF

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        return images.clone()


def blobs(n: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """One dim bright quarter per class in noise: uint8 n×1×8×8, labels."""
    generator = np.random.default_rng(5)
    labels = np.arange(n) % classes
    images = generator.normal(110, 30, (n, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 40
    return images.clip(0, 255).astype(np.uint8), labels


def train(classes: int = 4) -> Source:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, classes))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        images, labels = blobs(400, classes)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(torch.from_numpy(from_8bit(images)) - 0.5)
            nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
            optimizer.step()
    shift = nn.BatchNorm2d(1, affine=False, track_running_stats=True)
    shift.running_mean = torch.tensor([0.5])
    return Source("base", Threat.PUBLIC_BASE, nn.Sequential(shift, model), "a small network")


@pytest.fixture(scope="module")
def source() -> Source:
    torch.set_num_threads(1)
    return train()


def strong(source: Source, classes: int = 4) -> StrongResult:
    return run_strong(source, *blobs(90, classes), perturbation=BALL, budget=BUDGET, seed=0)


def test_pgd_passes_and_an_idle_attack_does_not(source: Source) -> None:
    images, labels = blobs(90)
    result = strong(source)
    made = craft(source, [PGD(), Idle()], images, labels, perturbation=BALL, seed=0)
    idle, pgd = self_check(source, made, labels, result)
    assert isinstance(pgd.strong_success, Proportion)
    assert pgd.strong_success.n == 60
    assert pgd.strong_success.value > 0.3
    assert pgd.passed
    assert pgd.strong_attack == "APGD-CE + APGD-T (2 targets), 10 steps each"
    assert not idle.passed
    assert idle.attack_success == Proportion(0, 60)


def test_only_the_first_images_that_the_source_gets_right_are_used(source: Source) -> None:
    images, labels = blobs(90)
    labels[:10] = (labels[:10] + 1) % 4
    result = run_strong(source, images, labels, perturbation=BALL, budget=BUDGET, seed=0)
    assert len(result.images) == BUDGET.images
    assert min(result.images) >= 10
    assert list(result.images) == sorted(result.images)


def test_the_strong_attack_repeats_and_leaves_the_random_state_and_the_model_alone(source: Source) -> None:
    source.model.train()
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    first = strong(source)
    assert torch.equal(state, torch.random.get_rng_state())
    assert source.model.training
    assert source.model[0].num_batches_tracked == 0  # type: ignore[index]
    source.model.eval()
    torch.manual_seed(5)
    assert strong(source) == first
    assert StrongResult.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_larger_budget_finds_no_fewer(source: Source) -> None:
    images, labels = blobs(90)
    small, large = (
        run_strong(source, images, labels, perturbation=BALL, budget=StrongBudget(steps, 3, 60), seed=0)
        for steps in (2, 25)
    )
    assert sum(large.fooled) >= sum(small.fooled)


@pytest.mark.parametrize(("classes", "name"), [(2, "APGD-CE,"), (3, "APGD-CE + APGD-DLR,")])
def test_few_classes_get_the_losses_that_they_allow(classes: int, name: str) -> None:
    result = strong(train(classes), classes)
    assert result.attack.startswith(name)
    assert sum(result.fooled) > 0


def test_progress_stays_within_the_stated_bound(source: Source) -> None:
    heard: list[int] = []
    images, labels = blobs(90)
    run_strong(source, images, labels, perturbation=BALL, budget=BUDGET, seed=0, progress=heard.append)
    assert 60 * 11 <= sum(heard) <= 60 * (BUDGET.steps + 1) * (1 + BUDGET.targets)


def test_a_source_that_gets_nothing_right_is_not_measured_and_does_not_pass(source: Source) -> None:
    images, _ = blobs(40)
    with torch.no_grad():
        predictions = source.model(torch.from_numpy(from_8bit(images))).argmax(1).numpy()
    never = (predictions + 1) % 4
    made = craft(source, [PGD(2)], images, never, perturbation=BALL, seed=0)
    result = run_strong(source, images, never, perturbation=BALL, budget=BUDGET, seed=0)
    assert isinstance(result.success, NotMeasured)
    (check,) = self_check(source, made, never, result)
    assert isinstance(check.attack_success, NotMeasured)
    assert not check.passed


class FirstPixel(nn.Module):
    """Class 1 where the first pixel is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, 0, 0, 0] - 0.5
        return torch.stack([-bright, bright], dim=1)


@pytest.mark.parametrize(("fooled", "passes"), [(100, True), (96, True), (95, True), (94, False), (0, False)])
def test_the_margin_is_five_points_and_its_edge_passes(fooled: int, passes: bool) -> None:
    source = Source("base", Threat.PUBLIC_BASE, FirstPixel(), "reads one pixel")
    images = np.zeros((100, 1, 2, 2), dtype=np.uint8)
    images[:fooled] = 255
    made = AdversarialSet("base", Threat.PUBLIC_BASE, Perturbation(Norm.LINF, 1.0), {"pgd": images})
    result = StrongResult("base", "APGD-CE", tuple(range(100)), (True,) * 100)
    (check,) = self_check(source, made, np.zeros(100, dtype=np.int64), result)
    assert check.passed is passes
    assert check.attack_success == Proportion(fooled, 100)


def test_an_l2_ball_has_its_own_strong_attack(source: Source) -> None:
    ball = Perturbation(Norm.L2, 0.5)
    images, labels = blobs(60)
    strong = run_strong(source, images, labels, perturbation=ball, budget=BUDGET, seed=0)
    made = craft(source, [PGD(norm=Norm.L2)], images, labels, perturbation=ball, seed=0)
    (check,) = self_check(source, made, labels, strong)
    assert sum(strong.fooled) / len(strong.fooled) > 0.1
    assert check.passed
    with pytest.raises(ValueError, match="knows no L0"):
        run_strong(source, images, labels, perturbation=Perturbation(Norm.L0, 3), budget=BUDGET, seed=0)


def test_results_of_different_sources_are_not_compared(source: Source) -> None:
    made = AdversarialSet("other", Threat.PUBLIC_BASE, BALL, {})
    with pytest.raises(ValueError, match="not one source"):
        self_check(source, made, np.zeros(1), StrongResult("base", "APGD-CE", (), ()))


def test_the_key_depends_on_everything_that_the_result_does(source: Source) -> None:
    images, labels = blobs(8)
    keys = {strong_key(source, images, labels, perturbation=BALL, budget=BUDGET, seed=0)}
    keys.add(strong_key(source, images, labels, perturbation=Perturbation(Norm.LINF, 8 / 255), budget=BUDGET, seed=0))
    keys.add(strong_key(source, images, labels, perturbation=BALL, budget=StrongBudget(), seed=0))
    keys.add(strong_key(source, images, labels, perturbation=BALL, budget=BUDGET, seed=1))
    keys.add(strong_key(source, images, (labels + 1) % 4, perturbation=BALL, budget=BUDGET, seed=0))
    keys.add(strong_key(train(3), images, labels, perturbation=BALL, budget=BUDGET, seed=0))
    assert len(keys) == 6


class Stairs(nn.Module):
    """Blobs told apart by steps of one level, with a gradient that has nothing to do with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.detach()) + 1e-6 * images.flatten(1)[:, :4]


def test_gradients_that_mislead_every_attack_are_found_out(source: Source) -> None:
    images, labels = blobs(60)
    assert fooled_without_bound(source.model, images, labels, seed=0) == Proportion(60, 60)
    masked = Source("masked", Threat.PUBLIC_BASE, Stairs(source.model), "its gradients mislead")
    strong = run_strong(masked, images, labels, perturbation=BALL, budget=BUDGET, seed=0)
    made = craft(masked, [PGD()], images, labels, perturbation=BALL, seed=0)
    (check,) = self_check(masked, made, labels, strong)
    assert check.passed  # nothing fools it, weak or strong, so that the comparison alone would believe it
    unbounded = fooled_without_bound(masked.model, images, labels, seed=0)
    assert isinstance(unbounded, Proportion)
    assert unbounded.value < 0.9
    attacked = AttackedSource(masked, Proportion(60, 60), made, (check,), unbounded)
    reasons = weak_sources([attacked], Proportion(60, 60))
    assert "the gradients of masked mislead" in reasons["masked"]
    assert weak_sources([replace(attacked, unbounded=Proportion(60, 60))], Proportion(60, 60)) == {}


def test_without_correct_images_nothing_is_said_about_gradients(source: Source) -> None:
    images, labels = blobs(8)
    assert isinstance(fooled_without_bound(source.model, images, (labels + 1) % 4, seed=0), NotMeasured)


def test_two_attacks_of_one_name_are_refused(source: Source) -> None:
    images, labels = blobs(8)
    with pytest.raises(ValueError, match="two attacks have one name"):
        craft(source, [PGD(steps=20), PGD(steps=1)], images, labels, perturbation=BALL, seed=0)
