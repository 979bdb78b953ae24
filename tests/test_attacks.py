"""Gradient attacks on a small trained network: the ball, seeds, strength, and gradients at 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.apgd import APGD
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.ball import Ball
from device_tests.attacks.bim import BIM
from device_tests.attacks.block_shuffle_rotation import BlockShuffleRotation
from device_tests.attacks.fgsm import FGSM
from device_tests.attacks.gradients import LARGEST_BATCH, at_rest, loss_gradient
from device_tests.attacks.input_diversity import InputDiversity
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.operator_perturbation import OperatorPerturbation
from device_tests.attacks.pgd import PGD
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError

EPSILON = 8 / 255
RADIUS = {Norm.LINF: EPSILON, Norm.L2: 0.25}
LOOP: list[Attack] = [
    attack
    for norm in (Norm.LINF, Norm.L2)
    for attack in (
        FGSM(norm), BIM(norm=norm), PGD(10, norm=norm), MomentumFGSM(norm=norm), InputDiversity(10, norm=norm),
        BlockShuffleRotation(4, copies=3, norm=norm), OperatorPerturbation(4, samples=3, norm=norm),
    )
]  # fmt: skip
LIBRARY: list[Attack] = [
    attack
    for norm in (Norm.LINF, Norm.L2)
    for attack in (
        APGD(steps=10, norm=norm), APGD("targeted", steps=10, targets=2, norm=norm),
        AutoAttack(steps=5, targets=2, queries=10, norm=norm),
    )
]  # fmt: skip
attacks = pytest.mark.parametrize("attack", [*LOOP, *LIBRARY], ids=lambda attack: attack.name)
loop_attacks = pytest.mark.parametrize("attack", LOOP, ids=lambda attack: attack.name)


def stripes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Four classes of noisy 10×10 stripes in different directions, dim enough to be attacked: uint8, labels."""
    generator = np.random.default_rng(7)
    labels = np.arange(n) % 4
    rows, columns = np.mgrid[:10, :10]
    waves = np.stack([np.sin(x) for x in (rows, columns, (rows + columns) / 1.4, (rows - columns) / 1.4)])
    images = 110 + 20 * waves[labels] + generator.normal(0, 20, (n, 10, 10))
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
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_candidates_stay_in_the_ball_before_and_after_rounding(
    trained: nn.Module, attack: Attack, scale: float
) -> None:
    perturbation = Perturbation(attack.norm, scale * RADIUS[attack.norm] + 1 / 255)
    clean, labels = stripes(24)
    clean[:8] = np.where(clean[:8] > 110, 255, 0)
    images, truth = tensors(clean, labels)
    candidates = attack.generate(trained, images, truth, epsilon=perturbation.radius, seed=1)
    assert candidates.shape == images.shape
    assert candidates.min() >= 0
    assert candidates.max() <= 1
    order = float("inf") if attack.norm is Norm.LINF else 2
    assert (candidates - images).flatten(1).norm(order, dim=1).max() <= perturbation.radius + 1e-6
    rounded = perturbation.to_8bit(candidates.numpy(), clean)
    assert perturbation.contains(rounded, clean).all()
    assert (rounded != clean).any() or (attack in LIBRARY and scale < 1)


@attacks
def test_the_seed_alone_decides(trained: nn.Module, attack: Attack) -> None:
    images, truth = tensors(*stripes(8))
    first = attack.generate(trained, images, truth, epsilon=RADIUS[attack.norm], seed=3)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(first, attack.generate(trained, images, truth, epsilon=RADIUS[attack.norm], seed=3))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "attack",
    [
        PGD(5), PGD(5, norm=Norm.L2), InputDiversity(5), BlockShuffleRotation(2, copies=2),
        OperatorPerturbation(2, samples=2), APGD(steps=5),
    ],
    ids=lambda attack: attack.name,
)  # fmt: skip
def test_another_seed_gives_other_candidates(trained: nn.Module, attack: Attack) -> None:
    images, truth = tensors(*stripes(8))
    radius = RADIUS[attack.norm]
    first, second = (attack.generate(trained, images, truth, epsilon=radius, seed=seed) for seed in (3, 4))
    assert not torch.equal(first, second)


@attacks
def test_an_attack_is_stronger_than_noise_and_wins_without_a_bound(trained: nn.Module, attack: Attack) -> None:
    images, truth = tensors(*stripes(64))
    assert share_wrong(trained, images, truth) < 0.05
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    noise *= EPSILON if attack.norm is Norm.LINF else RADIUS[Norm.L2] / 10
    noisy = share_wrong(trained, (images + noise).clamp(0, 1), truth)
    unbounded = 1.0 if attack.norm is Norm.LINF else 10.0
    shares = [
        share_wrong(trained, attack.generate(trained, images, truth, epsilon=epsilon, seed=0), truth)
        for epsilon in (RADIUS[attack.norm], unbounded)
    ]
    # What looks at turned and cut images need not follow this source, whose classes are directions.
    follows = not isinstance(attack, InputDiversity | BlockShuffleRotation | OperatorPerturbation)
    assert shares[0] >= noisy + (0.1 if follows else 0)
    assert shares[1] > (0.99 if follows else 0.6)


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
def test_attacks_are_as_strong_as_theory_says(trained: nn.Module, norm: Norm) -> None:
    images, truth = tensors(*stripes(100))

    def wrong(attack: Attack) -> float:
        return share_wrong(trained, attack.generate(trained, images, truth, epsilon=RADIUS[norm], seed=0), truth)

    one, few, many = (wrong(PGD(steps, norm=norm)) for steps in (1, 5, 20))
    assert few >= one - 0.02
    assert many >= few - 0.02
    assert many >= wrong(FGSM(norm)) - 0.02
    assert many >= wrong(BIM(norm=norm)) - 0.02
    strongest = wrong(AutoAttack(steps=20, targets=3, queries=20, norm=norm))
    assert strongest >= many - 0.01
    assert wrong(APGD(steps=20, norm=norm)) <= strongest


@attacks
def test_pixels_at_zero_and_one_are_moved_where_they_may_be(attack: Attack) -> None:
    # Logits (s, −s) with s = ±Σx: the loss of class 0 rises as pixels fall, so every pixel wants to move inward
    # from 1 under class 0 and inward from 0 under class 1. A clamp in the graph would leave all of them in place.
    class Brightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            total = images.mean(dim=(1, 2, 3)) - 0.5
            nothing = torch.zeros_like(total) - 9
            return torch.stack([total, -total, nothing, nothing], dim=1)

    images = torch.stack([torch.ones(1, 10, 10), torch.zeros(1, 10, 10)])
    radius = 0.6 if attack.norm is Norm.LINF else 6.0
    moved = attack.generate(Brightness(), images, torch.tensor([0, 1]), epsilon=radius, seed=0)
    assert moved[0].mean() < 0.5
    assert moved[1].mean() > 0.5
    if attack in LOOP and attack.norm is Norm.LINF and not isinstance(attack, BlockShuffleRotation):
        assert (moved[0] < 1).all()
        assert (moved[1] > 0).all()


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
        in_training = attack.generate(trained, images, truth, epsilon=RADIUS[attack.norm], seed=0)
        assert trained.training
        wanted = [parameter.requires_grad for parameter in trained.parameters()]
        assert wanted == [False] + [True] * (len(wanted) - 1)
        assert all(parameter.grad is None for parameter in trained.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    finally:
        trained.eval()
        next(trained.parameters()).requires_grad_(True)
    assert torch.equal(in_training, attack.generate(trained, images, truth, epsilon=RADIUS[attack.norm], seed=0))


@attacks
def test_progress_hears_of_every_gradient_in_every_batch(trained: nn.Module, attack: Attack) -> None:
    heard: list[int] = []
    images, truth = tensors(*stripes(LARGEST_BATCH + 4))
    attack.generate(trained, images, truth, epsilon=RADIUS[attack.norm] / 10, seed=0, progress=heard.append)
    assert max(heard) <= LARGEST_BATCH * max(1, attack.gradients_per_image)
    if attack in LOOP:
        assert sum(heard) == len(images) * attack.gradients_per_image
    else:
        assert 0 < sum(heard) <= len(images) * attack.gradients_per_image


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


@loop_attacks
def test_candidates_are_finite_where_the_gradient_is_zero_for_some_images(attack: Attack) -> None:
    class HalfConstant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            active = torch.tensor([1.0, 0.0]).repeat(len(images) // 2)
            total = images.mean(dim=(1, 2, 3)) * active
            return torch.stack([total, -total, total - 1], dim=1)

    images, truth = tensors(*stripes(4))
    made = attack.generate(HalfConstant(), images, truth % 3, epsilon=RADIUS[attack.norm], seed=0)
    assert torch.isfinite(made).all()


@loop_attacks
def test_a_model_that_only_answers_is_refused(attack: Attack) -> None:
    class Answers(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 3)

    images, truth = tensors(*stripes(2))
    with pytest.raises(InputError, match="Answers only answers"):
        attack.generate(Answers(), images, truth, epsilon=RADIUS[attack.norm], seed=0)


@pytest.mark.parametrize("norm", [Norm.L0, Norm.PATCH])
@pytest.mark.parametrize(
    "make",
    [FGSM, lambda norm: PGD(norm=norm), lambda norm: InputDiversity(norm=norm), lambda norm: AutoAttack(norm=norm)],
)
def test_a_norm_without_a_ball_is_refused(make: Callable[[Norm], Attack], norm: Norm) -> None:
    with pytest.raises(InputError, match=norm.value):
        make(norm)


def test_names_and_descriptions_tell_attacks_apart() -> None:
    every: list[Attack] = [*LOOP, *LIBRARY]
    assert len({attack.name for attack in every}) == len(every)
    assert len({attack.description for attack in every}) == len(every)
    assert PGD(bf16=True).description != PGD().description
    assert InputDiversity(smallest=0.5).description != InputDiversity(smallest=0.6).description


@pytest.mark.parametrize("attack", [PGD(10), MomentumFGSM(10, reach=10.0), InputDiversity(10)], ids=str)
def test_bfloat16_changes_hardly_any_verdict(trained: nn.Module, attack: PGD | MomentumFGSM | InputDiversity) -> None:
    images, truth = tensors(*stripes(200))
    with torch.no_grad():
        plain, quick = (
            trained(variant.generate(trained, images, truth, epsilon=EPSILON, seed=0)).argmax(1) != truth
            for variant in (attack, replace(attack, bf16=True))
        )
    assert (plain != quick).float().mean() < 0.05


def test_an_l2_step_is_shortened_onto_the_sphere() -> None:
    clean = torch.full((2, 1, 4, 4), 0.5)
    ball = Ball(Norm.L2, clean, 0.2)
    direction = torch.zeros_like(clean)
    direction[0, 0, 0, 0] = 3.0
    moved = ball.step(clean, direction, 1.0)
    assert moved[0, 0, 0, 0].item() == pytest.approx(0.7)
    assert torch.equal(moved[1], clean[1])
    assert torch.equal(moved[0].flatten()[1:], clean[0].flatten()[1:])


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
def test_random_starts_fill_the_ball(norm: Norm) -> None:
    clean = torch.full((4000, 1, 1, 2), 0.5)
    away = Ball(norm, clean, 0.2).random(torch.Generator().manual_seed(0)) - clean
    size = away.flatten(1).norm(float("inf") if norm is Norm.LINF else 2, dim=1)
    assert size.max() <= 0.2 + 1e-6
    # In two dimensions half of a ball's area lies within 1/√2 of its radius.
    assert (size < 0.2 / 2**0.5).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert away.mean(dim=0).abs().max() < 0.01
