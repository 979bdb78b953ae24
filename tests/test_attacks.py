"""Attacks on a small trained network: the ball, seeds, strength, and gradients at 0 and 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.attack import Attack
from device_tests.attacks.gradients import LARGEST_BATCH, at_rest, loss_gradient
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.pgd import PGD
from device_tests.images import from_8bit, to_8bit

EPSILON = 8 / 255
ATTACKS: list[Attack] = [PGD(steps=10), MomentumFGSM(steps=10)]
attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


def stripes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Four classes of noisy 12×12 stripes in different directions, dim enough to be attacked: uint8, labels."""
    generator = np.random.default_rng(7)
    labels = np.arange(n) % 4
    rows, columns = np.mgrid[:12, :12]
    waves = np.stack([np.sin(x) for x in (rows, columns, (rows + columns) / 1.4, (rows - columns) / 1.4)])
    images = 110 + 26 * waves[labels] + generator.normal(0, 22, (n, 12, 12))
    return images.clip(0, 255).astype(np.uint8)[:, None], labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A two-layer convolutional network, trained for 60 steps; dropout shows whether it is put at rest."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2), nn.GELU(), nn.Conv2d(12, 16, 3), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 4),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        images, labels = tensors(*stripes(512))
        for step in range(60):
            part = slice(64 * (step % 8), 64 * (step % 8) + 64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(from_8bit(images)), torch.from_numpy(labels)


def share_wrong(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) != labels).float().mean())


@attacks
@pytest.mark.parametrize("epsilon", [1 / 255, EPSILON, 0.3])
def test_candidates_stay_in_the_ball_before_and_after_rounding(
    trained: nn.Module, attack: Attack, epsilon: float
) -> None:
    clean, labels = stripes(160)
    clean[:40] = np.where(clean[:40] > 110, 255, 0)
    images, truth = tensors(clean, labels)
    candidates = attack.generate(trained, images, truth, epsilon=epsilon, seed=1)
    assert candidates.shape == images.shape
    assert candidates.min() >= 0
    assert candidates.max() <= 1
    assert (candidates - images).abs().max() <= epsilon + 1e-6
    moved = np.abs(to_8bit(candidates.numpy(), clean, epsilon).astype(int) - clean)
    assert (moved / 255 <= epsilon + 1e-9).all()
    assert moved.max() == int(epsilon * 255 + 1e-6)


@attacks
def test_the_seed_alone_decides(trained: nn.Module, attack: Attack) -> None:
    images, truth = tensors(*stripes(8))
    first = attack.generate(trained, images, truth, epsilon=EPSILON, seed=3)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(first, attack.generate(trained, images, truth, epsilon=EPSILON, seed=3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_another_seed_starts_pgd_elsewhere(trained: nn.Module) -> None:
    images, truth = tensors(*stripes(8))
    first, second = (PGD().generate(trained, images, truth, epsilon=EPSILON, seed=seed) for seed in (3, 4))
    assert not torch.equal(first, second)


@attacks
def test_an_attack_is_stronger_than_noise_and_wins_without_a_bound(trained: nn.Module, attack: Attack) -> None:
    images, truth = tensors(*stripes(200))
    assert share_wrong(trained, images, truth) < 0.05
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    noisy = share_wrong(trained, (images + EPSILON * noise).clamp(0, 1), truth)
    shares = [
        share_wrong(trained, attack.generate(trained, images, truth, epsilon=epsilon, seed=0), truth)
        for epsilon in (EPSILON, 1.0)
    ]
    assert shares[0] > noisy + 0.1
    assert shares[1] > 0.99


def test_more_steps_do_not_help_the_defender(trained: nn.Module) -> None:
    images, truth = tensors(*stripes(200))
    few, many = (
        share_wrong(trained, PGD(steps).generate(trained, images, truth, epsilon=EPSILON, seed=0), truth)
        for steps in (1, 20)
    )
    assert many >= few


@attacks
def test_pixels_at_zero_and_one_are_moved_where_they_may_be(attack: Attack) -> None:
    # Logits (s, −s) with s = ±Σx: the loss of class 0 rises as pixels fall, so every pixel wants to move inward
    # from 1 under class 0 and inward from 0 under class 1. A clamp in the graph would leave all of them in place.
    class Brightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            total = images.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack([total, -total], dim=1)

    images = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    moved = attack.generate(Brightness(), images, torch.tensor([0, 1]), epsilon=EPSILON, seed=0)
    assert torch.allclose(moved[0], torch.full((1, 4, 4), 1 - EPSILON), atol=1e-6)
    assert torch.allclose(moved[1], torch.full((1, 4, 4), EPSILON), atol=1e-6)
    outward = attack.generate(Brightness(), images, torch.tensor([1, 0]), epsilon=EPSILON, seed=0)
    assert torch.equal(outward, images)


def test_a_clamp_in_the_graph_would_hide_the_gradient() -> None:
    # Why the rule exists; if a newer torch changes this, the rule may be dropped.
    leaf = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    assert torch.autograd.grad(leaf.clamp(0, 1).sum(), leaf)[0].tolist() == [0, 1, 0]


@attacks
def test_the_model_is_left_as_it_was(trained: nn.Module, attack: Attack) -> None:
    trained.train()
    next(trained.parameters()).requires_grad_(False)
    try:
        before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        images, truth = tensors(*stripes(16))
        in_training = attack.generate(trained, images, truth, epsilon=EPSILON, seed=0)
        assert trained.training
        wanted = [parameter.requires_grad for parameter in trained.parameters()]
        assert wanted == [False] + [True] * (len(wanted) - 1)
        assert all(parameter.grad is None for parameter in trained.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    finally:
        trained.eval()
        next(trained.parameters()).requires_grad_(True)
    assert torch.equal(in_training, attack.generate(trained, images, truth, epsilon=EPSILON, seed=0))


@attacks
def test_progress_hears_of_every_gradient_and_batches_do_not_matter(trained: nn.Module, attack: Attack) -> None:
    heard: list[int] = []
    images, truth = tensors(*stripes(LARGEST_BATCH + 30))
    attack.generate(trained, images, truth, epsilon=EPSILON, seed=0, progress=heard.append)
    assert sum(heard) == len(images) * attack.gradients_per_image
    assert len(heard) == 2 * attack.gradients_per_image


def test_the_gradient_of_an_image_does_not_depend_on_its_batch(trained: nn.Module) -> None:
    images, truth = tensors(*stripes(16))
    with at_rest(trained):
        together = loss_gradient(trained, images, truth)
        alone = loss_gradient(trained, images[3:4], truth[3:4])
    assert torch.allclose(together[3:4], alone, rtol=1e-4, atol=1e-7)


def test_momentum_matches_the_papers_equations(trained: nn.Module) -> None:
    # Dong et al., eq. 6 and 7, written out for one image and two steps.
    images, truth = tensors(*stripes(1))
    x, g = images, torch.zeros_like(images)
    for _ in range(2):
        gradient = loss_gradient(trained, x, truth)
        g = 1.0 * g + gradient / gradient.abs().sum()
        x = x + EPSILON / 2 * g.sign()
    made = MomentumFGSM(steps=2).generate(trained, images, truth, epsilon=EPSILON, seed=0)
    assert torch.allclose(made, x.clamp(0, 1), atol=1e-6)


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.sum(dim=(1, 2, 3), keepdim=True).flatten(1) * torch.zeros(1, 3)

    images, truth = tensors(*stripes(4))
    made = MomentumFGSM().generate(Constant(), images, truth % 3, epsilon=EPSILON, seed=0)
    assert torch.equal(made, images)
