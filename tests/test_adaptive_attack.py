"""Attacks on a loss of the attacker's own: as strong as the plain ones on the plain loss, and following another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from device_tests.attacks.adaptive import AdaptiveAttack, Method
from device_tests.attacks.attack import Attack
from device_tests.attacks.bim import BIM
from device_tests.attacks.fgsm import FGSM
from device_tests.attacks.pgd import PGD
from device_tests.perturbation import Norm
from factory.data import Splits
from keys.errors import InputError


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels, reduction="sum")


def towards_the_first_class(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.log_softmax(model(images), dim=1)[:, 0].sum()


@pytest.fixture(scope="module")
def case(tiny_splits: Splits) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    return model, tiny_splits.test.images[:40].float() / 255, tiny_splits.test.labels[:40]


@pytest.mark.parametrize(("method", "plain"), [("fgsm", FGSM()), ("bim", BIM(steps=5)), ("pgd", PGD(steps=5))])
def test_on_the_cross_entropy_it_is_the_plain_attack(
    case: tuple[nn.Module, Tensor, Tensor], method: Method, plain: Attack
) -> None:
    model, images, labels = case
    attack = AdaptiveAttack(method, cross_entropy, "cross-entropy", steps=5)
    assert attack.gradients_per_image == plain.gradients_per_image
    made, expected = (one.generate(model, images, labels, epsilon=0.1, seed=3) for one in (attack, plain))
    assert torch.allclose(made, expected, atol=1e-6)
    assert attack.name == f"adaptive-{plain.name}"


@pytest.mark.parametrize("method", ["fgsm", "bim", "mi-fgsm", "pgd"])
@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2])
def test_it_climbs_the_loss_that_it_is_given_inside_the_ball(
    case: tuple[nn.Module, Tensor, Tensor], method: Method, norm: Norm
) -> None:
    model, images, labels = case
    model.train()
    attack = AdaptiveAttack(method, towards_the_first_class, "towards the first class", steps=5, norm=norm)
    made = attack.generate(model, images, labels, epsilon=0.2, seed=3)
    assert model.training  # left as it was, and attacked without dropout
    assert made.min() >= 0
    assert made.max() <= 1
    change = (made - images).flatten(1)
    size = change.abs().max(dim=1).values if norm is Norm.LINF else change.norm(dim=1)
    assert (size <= 0.2 + 1e-5).all()
    model.eval()
    with torch.no_grad():
        gained = towards_the_first_class(model, made, labels) - towards_the_first_class(model, images, labels)
    assert gained > 0


def test_a_loss_that_is_not_finite_is_an_error(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    attack = AdaptiveAttack("pgd", lambda m, x, y: (m(x) * 0).sqrt().sum(), "a root", steps=1)
    with pytest.raises(InputError, match="a root of a source has no finite gradient"):
        attack.generate(model, images, labels, epsilon=0.1, seed=0)
