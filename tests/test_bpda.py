"""BPDA and EOT: what a defence without a gradient, or with a random one, hides from PGD and not from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.apgd import APGD
from device_tests.attacks.attack import Attack
from device_tests.attacks.bpda import StandInGradient
from device_tests.attacks.expectation import Expectation, ExpectedPGD, expected_gradient
from device_tests.attacks.gradients import loss_gradient
from device_tests.attacks.pgd import PGD
from device_tests.images import from_8bit
from device_tests.perturbation import Norm
from keys.errors import InputError

EPSILON = 0.1


class Quantise(nn.Module):
    """Four grey levels: piecewise constant, so that its gradient is zero wherever it has one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.round(images * 3) / 3


class RandomShift(nn.Module):
    """Each batch moved by up to ``reach`` pixels in a direction drawn anew, in evaluation mode, too."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        down, right = torch.randint(-self.reach, self.reach + 1, (2,)).tolist()
        return images.roll((down, right), (2, 3))


@pytest.fixture(scope="module")
def network(sample_images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A convolutional network on 1,500 real images, each shifted by up to three pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(600, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        x = torch.from_numpy(from_8bit(sample_images[0][:1500, None]))
        labels = torch.from_numpy(sample_images[1][:1500].astype(np.int64))
        shift = RandomShift(3)
        for step in range(240):
            part = slice(50 * (step % 30), 50 * (step % 30) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(shift(x[part])), labels[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@pytest.fixture(scope="module")
def images(network: nn.Module, sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Eighty test images that the network gets right, and their labels."""
    x = torch.from_numpy(from_8bit(sample_images[0][2000:2200, None]))
    labels = torch.from_numpy(sample_images[1][2000:2200].astype(np.int64))
    with torch.no_grad():
        right = network(Quantise()(x)).argmax(1) == labels
    return x[right][:80], labels[right][:80]


def wrong(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, draws: int = 1) -> float:
    """Share of wrong answers, mean over draws of the model."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(99)
        return float(np.mean([(model(images).argmax(1) != labels).float().mean() for _ in range(draws)]))


def test_the_answer_is_the_defences_own_and_the_gradient_the_stand_ins() -> None:
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wrapped = StandInGradient(Quantise(), lambda values: 2 * values)
    answer = wrapped(x)
    assert torch.equal(answer, Quantise()(x.detach()))
    (answer * torch.arange(16.0).view(4, 4)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * torch.arange(16.0).view(1, 1, 4, 4).expand(3, 1, 4, 4))
    with torch.no_grad():
        assert torch.equal(wrapped(x), answer)
    assert "lambda" in str(wrapped)


def test_a_stand_in_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"gives \(1, 16\) where"):
        StandInGradient(Quantise(), nn.Flatten())(torch.rand(1, 1, 4, 4, requires_grad=True))


@pytest.mark.parametrize("attack", [PGD(10), APGD(steps=10), PGD(10, norm=Norm.L2)], ids=lambda attack: attack.name)
def test_bpda_breaks_a_quantising_defence_that_hides_its_gradient(
    network: nn.Module, images: tuple[torch.Tensor, torch.Tensor], attack: Attack
) -> None:
    x, labels = images
    epsilon = 1.5 if attack.norm is Norm.L2 else EPSILON
    defended = nn.Sequential(Quantise(), network)
    hidden = attack.generate(defended, x, labels, epsilon=epsilon, seed=0)
    found = attack.generate(nn.Sequential(StandInGradient(Quantise()), network), x, labels, epsilon=epsilon, seed=0)
    # Both are judged on the defence itself.
    assert wrong(defended, hidden, labels) < 0.25
    assert wrong(defended, found, labels) > wrong(defended, hidden, labels) + 0.4


def test_the_expected_gradient_is_the_mean_over_the_draws(
    network: nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, labels = images[0][:4], images[1][:4]
    model = nn.Sequential(RandomShift(3), network)
    state = torch.random.get_rng_state()
    found = expected_gradient(model, x, labels, draws=200, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(found, expected_gradient(model, x, labels, draws=200, seed=3))
    exact = torch.zeros_like(x)
    for down in range(-3, 4):
        for right in range(-3, 4):
            exact += loss_gradient(network, x, labels, transform=lambda v, d=down, r=right: v.roll((d, r), (2, 3)))
    # All 49 shifts are the whole distribution: 200 draws come near its mean, four do not.
    near = (found - exact / 49).norm() / (exact / 49).norm()
    far = (expected_gradient(model, x, labels, draws=4, seed=3) - exact / 49).norm() / (exact / 49).norm()
    assert near < 0.35
    assert near < far / 2


def test_eot_beats_pgd_on_a_model_that_shifts_at_random(
    network: nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, labels = images
    model = nn.Sequential(RandomShift(3), network)
    plain = PGD(4).generate(model, x, labels, epsilon=EPSILON / 2, seed=0)
    averaged = ExpectedPGD(draws=12, steps=4).generate(model, x, labels, epsilon=EPSILON / 2, seed=0)
    through = PGD(4).generate(Expectation(model, draws=12), x, labels, epsilon=EPSILON / 2, seed=0)
    rates = {name: wrong(model, found, labels, draws=30) for name, found in (
        ("clean", x), ("plain", plain), ("averaged", averaged), ("through", through),
    )}  # fmt: skip
    assert rates["averaged"] > rates["plain"] + 0.05, rates
    assert rates["through"] > rates["plain"] + 0.05, rates


def test_without_randomness_eot_is_pgd(network: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = images[0][:8], images[1][:8]
    plain = PGD(3).generate(network, x, labels, epsilon=EPSILON, seed=5)
    heard = [0]

    def progress(done: int) -> None:
        heard[0] += done

    attack = ExpectedPGD(draws=1, steps=3)
    assert torch.equal(plain, attack.generate(network, x, labels, epsilon=EPSILON, seed=5, progress=progress))
    assert heard[0] == attack.gradients_per_image * len(x)
    assert ExpectedPGD(draws=2).description != attack.description


def test_an_expectation_draws_anew_and_can_be_repeated(
    network: nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    mean = Expectation(nn.Sequential(RandomShift(3), network), draws=2, seed=1)
    with torch.no_grad():
        first, second = mean(images[0]), mean(images[0])
        mean.restart()
        assert torch.equal(mean(images[0]), first)
    assert not torch.equal(first, second)
    for build in (lambda: Expectation(network, draws=0), lambda: ExpectedPGD(draws=0)):
        with pytest.raises(InputError, match="at least one draw"):
            build()
