"""The prototype conformity loss: Eq. 5 to the letter, finite gradients everywhere, a bound, absent classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from factory.prototypes.loss import Bound, prototype_conformity

NONE = Bound("none", 1.0)


def drawn(images: int = 7, classes: int = 4, width: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = scale * torch.randn(images, width, generator=generator)
    centroids = scale * torch.randn(classes, width, generator=generator)
    return features, torch.randint(classes, (images,), generator=generator), centroids


def literal(features: Tensor, labels: Tensor, centroids: Tensor) -> float:
    """Eq. 5 as it is printed, one norm after the other, divided by the number of images."""
    k, total = len(centroids), 0.0
    for f, y in zip(features.tolist(), labels.tolist(), strict=True):
        own = centroids[y].tolist()
        pushed = 0.0
        for j in range(k):
            if j != y:
                other = centroids[j].tolist()
                pushed += math.dist(f, other) + math.dist(own, other)
        total += math.dist(f, own) - pushed / (k - 1)
    return total / len(features)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_it_is_equation_5(classes: int) -> None:
    features, labels, centroids = drawn(classes=classes)
    assert prototype_conformity(features, labels, centroids, NONE).item() == pytest.approx(
        literal(features, labels, centroids), rel=1e-5
    )


def test_a_wide_ball_is_equation_5_and_a_small_one_bounds_it() -> None:
    features, labels, centroids = drawn()
    expected = literal(features, labels, centroids)
    assert prototype_conformity(features, labels, centroids, Bound("ball", 100)).item() == pytest.approx(expected, 1e-5)
    # Centroids and features ever farther apart: Eq. 5 falls for ever, in a ball no farther than −4·radius.
    own = centroids[labels]
    far = [prototype_conformity(own * s, labels, centroids * s, NONE).item() for s in (1, 10, 100)]
    assert far[0] > far[1] > far[2]
    for scale in (1.0, 10.0, 1000.0):
        held = prototype_conformity(own * scale, labels, centroids * scale, Bound("ball", 0.5)).item()
        assert -4 * 0.5 - 1e-4 <= held < 0
    assert prototype_conformity(own * 1e3, labels, centroids * 1e3, Bound("ball", 0.5)).item() == pytest.approx(-2)


def test_on_a_sphere_lengths_do_not_count() -> None:
    features, labels, centroids = drawn()
    sphere = Bound("sphere", 3.0)
    value = prototype_conformity(features, labels, centroids, sphere).item()
    assert prototype_conformity(7 * features, labels, 0.1 * centroids, sphere).item() == pytest.approx(value, rel=1e-5)
    assert value >= -4 * 3.0
    unit = [3.0 * torch.nn.functional.normalize(part, dim=1) for part in (features, centroids)]
    assert value == pytest.approx(literal(unit[0], labels, unit[1]), rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "ball", "sphere"])
def test_gradients_are_finite_where_everything_coincides(kind: str) -> None:
    bound = Bound(kind, 1.0)  # type: ignore[arg-type]
    for value in (0.0, 1.0):
        features = torch.full((3, 4), value, requires_grad=True)
        centroids = torch.full((5, 4), value, requires_grad=True)
        prototype_conformity(features, torch.tensor([0, 0, 4]), centroids, bound).backward()
        for tensor in (features, centroids):
            assert tensor.grad is not None
            assert torch.isfinite(tensor.grad).all()


def test_the_gradient_is_that_of_equation_5() -> None:
    features, labels, centroids = drawn(images=3, classes=3, width=2)
    features.requires_grad_(True)
    centroids.requires_grad_(True)
    prototype_conformity(features, labels, centroids, NONE).backward()
    step = 1e-3
    for tensor in (features, centroids):
        assert tensor.grad is not None
        for place in range(tensor.numel()):
            moved = [tensor.detach().clone() for _ in range(2)]
            moved[0].view(-1)[place] += step
            moved[1].view(-1)[place] -= step
            sides = [(one, centroids.detach()) if tensor is features else (features.detach(), one) for one in moved]
            values = [literal(f, labels, c) for f, c in sides]
            assert tensor.grad.view(-1)[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-3)


def test_a_class_without_images_is_pulled_by_nothing_and_its_centroid_is_pushed() -> None:
    centroids = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]], requires_grad=True)
    features = torch.tensor([[0.5, 0.0], [1.0, 0.0]], requires_grad=True)
    prototype_conformity(features, torch.tensor([0, 0]), centroids, NONE).backward()
    gradient = centroids.grad
    assert gradient is not None
    # Only class 0 is there. The others' gradients are those of the push alone: away from its images and its centroid.
    for absent, point in ((1, (4.0, 0.0)), (2, (0.0, 3.0))):
        expected = torch.zeros(2)
        for f in features.detach():
            away = torch.tensor(point) - f
            expected -= (away / away.norm() + torch.tensor(point) / torch.tensor(point).norm()) / 2 / len(features)
        assert gradient[absent].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    # With the push ended by a small ball, nothing moves them at all.
    held = centroids.detach().clone().requires_grad_(True)
    prototype_conformity(features.detach(), torch.tensor([0, 0]), held, Bound("ball", 0.5)).backward()
    assert held.grad is not None
    assert held.grad[1:].abs().max() == 0
    assert held.grad[0].abs().max() > 0
