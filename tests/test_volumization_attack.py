"""The attack on the order: inside its ball, judged by the true model, and stronger where sorting hides gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from device_tests.attacks.bim import BIM
from device_tests.attacks.order_flip import OrderFlip
from device_tests.perturbation import Norm
from factory.volumization.order import METRICS
from factory.volumization.volumize import Volumize
from keys.errors import InputError

EPSILON = 8 / 255


class PlaceReader(nn.Module):
    """Looks at nothing but which of two patches comes first: its gradient by the image is zero, its order is all."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.volumize = Volumize(4, order)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def orders(self, images: Tensor) -> Tensor:
        return self.volumize.orders(images)

    def held(self, images: Tensor, orders: Tensor) -> Tensor:
        first = orders[:, :1].float()
        return self.scale * torch.cat([1 - first, first], 1) + 0 * images.sum((1, 2, 3)).unsqueeze(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.held(images, self.orders(images))


def near_ties(count: int) -> Tensor:
    """Two patches of nearly equal histograms, the left one first: a few levels decide."""
    generator = torch.Generator().manual_seed(0)
    left = torch.full((count, 1, 4, 4), 120.0)
    left[:, :, :2] = 150.0
    right = left.clone()
    right[:, :, 0, 0] = 90.0
    noise = torch.randint(0, 3, (count, 1, 4, 8), generator=generator)
    return (torch.cat([left, right], 3) + noise) / 255


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def attack(model: PlaceReader, **changes: object) -> OrderFlip:
    budget: dict = {"steps": 4, "climbs": 4, "proposals": 8, **changes}
    return OrderFlip(model.orders, model.held, **budget)


def test_flips_the_order_of_a_model_whose_gradient_is_zero() -> None:
    model, images = PlaceReader("entropy"), near_ties(20)
    labels = model(images).argmax(1)
    assert labels.eq(0).all()
    found = attack(model).generate(model, images, labels, epsilon=EPSILON, seed=0)
    assert accuracy(model, found, labels) < 0.2
    # Gradients alone move nothing.
    still = BIM(steps=4).generate(model, images, labels, epsilon=EPSILON, seed=0)
    assert torch.equal(still, images)


class Sorted(nn.Module):
    """A small random network behind a sorted volume: both the pixels and their order matter."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volumize = Volumize(4, order)
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24, bias=False), nn.Tanh(), nn.Linear(24, 3, bias=False)
        )

    def orders(self, images: Tensor) -> Tensor:
        return self.volumize.orders(images)

    def held(self, images: Tensor, orders: Tensor) -> Tensor:
        return self.network(self.volumize.held(images, orders) - 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.held(images, self.orders(images))


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(40, 1, 8, 8, generator=generator) * 0.2 + 0.4).mul(255).round() / 255


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
@pytest.mark.parametrize("holding", ["clean", "current", "candidate"])
def test_stays_in_its_ball_and_never_does_worse_than_nothing(holding: str, norm: Norm, images: Tensor) -> None:
    model = Sorted("entropy")
    labels = model(images).argmax(1)
    made = OrderFlip(model.orders, model.held, steps=5, climbs=2, holding=holding, norm=norm)  # pyright: ignore
    radius = 0.03 if norm is Norm.LINF else 0.2
    heard: list[int] = []
    found = made.generate(model, images, labels, epsilon=radius, seed=3, progress=heard.append)
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm is Norm.LINF else change.norm(dim=1)
    assert size.max() <= radius + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert sum(heard) == made.gradients_per_image * len(images)
    assert accuracy(model, found, labels) < 1
    assert torch.equal(found, made.generate(model, images, labels, epsilon=radius, seed=3))
    none = made.generate(model, images, labels, epsilon=1e-9, seed=3)
    torch.testing.assert_close(none, images)


@pytest.mark.parametrize("order", METRICS)
def test_is_no_weaker_than_one_climb_with_the_order_held(order: str, images: Tensor) -> None:
    model = Sorted(order)
    labels = model(images).argmax(1)
    results = {
        holding: accuracy(
            model,
            OrderFlip(model.orders, model.held, steps=5, climbs=climbs, holding=holding).generate(
                model, images, labels, epsilon=0.03, seed=0
            ),
            labels,
        )
        for holding, climbs in (("clean", 1), ("candidate", 6))
    }
    assert results["candidate"] <= results["clean"]
    # The orders of the images it ends with are others than those it started with.
    found = OrderFlip(model.orders, model.held, steps=5).generate(model, images, labels, epsilon=0.03, seed=0)
    assert (model.orders(found) != model.orders(images)).any()


def test_names_and_budgets_are_its_own() -> None:
    model = Sorted("entropy")
    made = [OrderFlip(model.orders, model.held, holding=holding) for holding in ("clean", "current", "candidate")]
    assert [attack.name for attack in made] == ["order-clean", "order-current", "order-flip"]
    assert len({attack.description for attack in made}) == 3
    assert made[0].gradients_per_image == 80
    assert "0x" not in repr(made[0])


def test_refuses_budgets_and_holdings_that_are_none() -> None:
    model = Sorted("entropy")
    with pytest.raises(InputError, match="held at one of"):
        OrderFlip(model.orders, model.held, holding="soft")  # pyright: ignore
    with pytest.raises(InputError, match="one step"):
        OrderFlip(model.orders, model.held, steps=0)
    with pytest.raises(InputError, match="L∞ or L2"):
        OrderFlip(model.orders, model.held, norm=Norm.L0)
