"""BPDA: what a defence without a gradient hides from PGD and not from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.apgd import APGD
from device_tests.attacks.attack import Attack
from device_tests.attacks.bpda import StandInGradient
from device_tests.attacks.pgd import PGD
from device_tests.images import from_8bit
from device_tests.perturbation import Norm
from keys.errors import InputError

EPSILON = 0.1


class Quantise(nn.Module):
    """Four grey levels: piecewise constant, so that its gradient is zero wherever it has one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.round(images * 3) / 3


@pytest.fixture(scope="module")
def network(sample_images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A convolutional network on 1,500 real images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(600, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        x = torch.from_numpy(from_8bit(sample_images[0][:1500, None]))
        labels = torch.from_numpy(sample_images[1][:1500].astype(np.int64))
        for step in range(240):
            part = slice(50 * (step % 30), 50 * (step % 30) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[part]), labels[part]).backward()
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


@torch.no_grad()
def wrong(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of wrong answers."""
    return float((model(images).argmax(1) != labels).float().mean())


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
