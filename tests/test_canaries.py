"""Canaries: an ordinary model passes them all, and models that hide their gradients fail those made for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.pgd import PGD
from device_tests.canaries import Canaries, canary_cost, loss_slice, run_canaries
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.self_check import StrongBudget
from exporters.measured import NotMeasured

EPSILON = 16 / 255
BUDGET = StrongBudget(steps=10, targets=2)
ALL = [
    "same answer twice", "loss surface", "unbounded budget", "more steps", "noise, FGSM, PGD",
    "white box against black box", "white box against queries",
]  # fmt: skip


def blobs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """One dim bright quarter per class in noise: uint8 n×1×8×8, labels."""
    generator = np.random.default_rng(5)
    labels = np.arange(n) % 4
    images = generator.normal(110, 30, (n, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 40
    return images.clip(0, 255).astype(np.uint8), labels


def train(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        images, labels = blobs(400)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(torch.from_numpy(from_8bit(images)) - 0.5)
            nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
            optimizer.step()
    return Masked(model.eval(), before=lambda x: x - 0.5)


class Masked(nn.Module):
    """A model behind something done to its images and to its logits."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.after(self.model(self.before(images)))


@dataclass(frozen=True)
class SignSearch:
    """Flips the sign of random stripes of a ±ε pattern and keeps what lowers the margin: scores alone, no gradients."""

    queries: int = 150
    norm: Norm = Norm.LINF

    @property
    def name(self) -> str:
        return "sign search"

    @property
    def description(self) -> str:
        return f"sign search, {self.queries} queries"

    @property
    def gradients_per_image(self) -> int:
        return self.queries

    @torch.no_grad()
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
        def margin(pattern: torch.Tensor) -> torch.Tensor:
            logits = model((images + epsilon * pattern).clamp(0, 1)).double()
            right = logits.gather(1, labels[:, None])[:, 0]
            return right - logits.scatter(1, labels[:, None], -math.inf).amax(1)

        generator = torch.Generator().manual_seed(seed)
        if progress is not None:
            progress(self.queries * len(images))
        pattern = torch.where(torch.rand(images.shape, generator=generator) < 0.5, -1.0, 1.0)
        best = margin(pattern)
        for _ in range(self.queries - 1):
            flip = torch.where(torch.rand(images.shape, generator=generator) < 0.1, -1.0, 1.0)
            tried = pattern * flip
            found = margin(tried)
            better = found < best
            pattern, best = torch.where(better[:, None, None, None], tried, pattern), torch.where(better, found, best)
        return (images + epsilon * pattern).clamp(0, 1)


@pytest.fixture(scope="module")
def sound() -> nn.Module:
    torch.set_num_threads(1)
    return train(1)


@pytest.fixture(scope="module")
def transferred() -> np.ndarray:
    """PGD on another model of the same data."""
    images, labels = blobs(120)
    x = torch.from_numpy(from_8bit(images))
    made = PGD().generate(train(2), x, torch.from_numpy(labels), epsilon=EPSILON, seed=0)
    return Perturbation(Norm.LINF, EPSILON).to_8bit(made.numpy(), images)


def canaries_of(model: nn.Module, transferred: np.ndarray, progress: Progress | None = None) -> Canaries:
    return run_canaries(
        model, *blobs(120), epsilon=EPSILON, seed=0, black_box={"pgd on another": transferred}, square=SignSearch(),
        source="it", strong=BUDGET, progress=progress,
    )  # fmt: skip


def failed(model: nn.Module, transferred: np.ndarray) -> set[str]:
    return {canary.name for canary in canaries_of(model, transferred).failed}


def test_an_ordinary_model_passes_every_canary(sound: nn.Module, transferred: np.ndarray) -> None:
    heard: list[int] = []
    sound.train()
    canaries = canaries_of(sound, transferred, heard.append)
    assert sound.training
    assert all(parameter.requires_grad for parameter in sound.parameters())
    sound.eval()
    assert canaries.passed, canaries.reasons
    assert [canary.name for canary in canaries.results] == ALL
    assert canaries.failed == canaries.reasons == ()
    assert 100 < canaries.images <= 120
    assert 0 < sum(heard) <= canaries.images * canary_cost(BUDGET, SignSearch())
    assert Canaries.from_json(json.loads(json.dumps(canaries.to_json()))) == canaries


def test_logits_so_large_that_the_softmax_has_no_gradient(sound: nn.Module, transferred: np.ndarray) -> None:
    masked = Masked(sound, after=lambda logits: 1e4 * logits)
    assert failed(masked, transferred) >= {"loss surface", "unbounded budget", "noise, FGSM, PGD"}


def test_probabilities_that_saturate(sound: nn.Module, transferred: np.ndarray) -> None:
    masked = Masked(sound, after=lambda logits: (1e3 * logits).softmax(dim=1))
    assert failed(masked, transferred) >= {"loss surface", "unbounded budget", "white box against black box"}


def test_an_input_in_stair_steps(sound: nn.Module, transferred: np.ndarray) -> None:
    masked = Masked(sound, before=lambda x: (16 * x).round() / 16)
    assert failed(masked, transferred) == set(ALL) - {"same answer twice", "more steps"}


def test_an_activation_without_a_gradient(sound: nn.Module, transferred: np.ndarray) -> None:
    masked = Masked(sound, after=lambda logits: logits.detach() + 0 * logits)
    assert failed(masked, transferred) == set(ALL) - {"same answer twice", "more steps"}


def test_gradients_that_point_the_wrong_way(sound: nn.Module, transferred: np.ndarray) -> None:
    masked = Masked(sound, before=lambda x: 2 * x.detach() - x)
    assert failed(masked, transferred) >= {"loss surface", "unbounded budget", "white box against black box"}


def test_waves_between_the_8_bit_levels_fool_small_steps_only(sound: nn.Module, transferred: np.ndarray) -> None:
    # No change at all on 8-bit images, where FGSM starts and ends; between them the gradient's sign is arbitrary.
    masked = Masked(sound, before=lambda x: x + 0.02 * torch.sin(2 * math.pi * 255 * x))
    canaries = canaries_of(masked, transferred)
    assert [canary.name for canary in canaries.failed] == ["more steps"]
    assert not canaries.passed
    (reason,) = canaries.reasons
    assert reason.startswith("more steps: BIM fools ")
    assert "fewer steps fool more than more steps do" in reason


def test_answers_at_random(sound: nn.Module, transferred: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(0)
    masked = Masked(sound, after=lambda logits: logits + 3 * torch.randn(logits.shape, generator=generator))
    assert failed(masked, transferred) >= {"same answer twice", "loss surface"}


def test_what_is_not_given_is_not_measured_and_does_not_pass(sound: nn.Module) -> None:
    canaries = run_canaries(
        sound, *blobs(60), epsilon=EPSILON, seed=0, black_box={}, square=None, source="it", strong=BUDGET
    )
    black, queries = canaries.results[-2:]
    assert isinstance(black.verdict, NotMeasured)
    assert isinstance(queries.verdict, NotMeasured)
    assert not canaries.passed
    assert canaries.failed == ()
    assert len(canaries.reasons) == 2
    assert Canaries.from_json(canaries.to_json()) == canaries


def test_too_few_right_images_are_not_measured(sound: nn.Module) -> None:
    images, labels = blobs(60)
    canaries = run_canaries(
        sound, images, (labels + 1) % 4, epsilon=EPSILON, seed=0, black_box={}, square=None, strong=BUDGET
    )
    assert all(isinstance(canary.verdict, NotMeasured) for canary in canaries.results)
    assert not canaries.passed


def test_a_model_without_finite_gradients_is_not_measured(sound: nn.Module, transferred: np.ndarray) -> None:
    broken = Masked(sound, before=lambda x: x + 0 * (x - x.detach()).abs().sqrt())
    canaries = canaries_of(broken, transferred)
    assert not canaries.passed
    surface = next(canary for canary in canaries.results if canary.name == "loss surface")
    assert isinstance(surface.verdict, NotMeasured)
    assert "no finite gradient" in surface.sentence


def test_black_box_images_outside_the_ball_are_refused(sound: nn.Module) -> None:
    images, labels = blobs(30)
    far = {"far": np.where(images > 200, 0, images + 50).astype(np.uint8)}
    with pytest.raises(ValueError, match="far do not lie within"):
        run_canaries(sound, images, labels, epsilon=EPSILON, seed=0, black_box=far, square=None)


def test_verdicts_that_were_changed_are_noticed(sound: nn.Module) -> None:
    stored = run_canaries(
        sound, *blobs(30), epsilon=EPSILON, seed=0, black_box={}, square=None, strong=BUDGET
    ).to_json()
    with pytest.raises(ValueError, match="disagree"):
        Canaries.from_json({**stored, "passed": True})
    with pytest.raises(ValueError, match="no canaries"):
        Canaries.from_json({"source": "it"})


def test_the_loss_rises_along_the_gradient_and_a_masked_model_is_flat(sound: nn.Module) -> None:
    images, labels = blobs(4)
    losses = loss_slice(sound, images[0], int(labels[0]), epsilon=EPSILON, points=9, seed=3)
    assert losses.shape == (9, 9)
    assert losses.dtype == np.float64
    assert (np.diff(losses[:, 4]) > 0).all()
    with torch.no_grad():
        logits = sound(torch.from_numpy(from_8bit(images[:1])))
    assert losses[4, 4] == pytest.approx(
        float(nn.functional.cross_entropy(logits, torch.tensor([labels[0]]))), rel=1e-3
    )
    # A random direction changes the loss far less than the gradient's.
    assert np.ptp(losses[4]) < np.ptp(losses[:, 4]) / 2
    assert np.array_equal(losses, loss_slice(sound, images[0], int(labels[0]), epsilon=EPSILON, points=9, seed=3))
    stairs = Masked(sound, before=lambda x: (2 * x).round() / 2)
    assert np.ptp(loss_slice(stairs, images[0], int(labels[0]), epsilon=EPSILON, points=9)[:, 4]) == 0
    with pytest.raises(ValueError, match="odd number"):
        loss_slice(sound, images[0], 0, epsilon=EPSILON, points=8)
