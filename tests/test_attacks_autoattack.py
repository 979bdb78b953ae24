"""AutoAttack as an attack gives what the authors' own class gives, and works where that class does not."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pyautoattack.autoattack import AutoAttack as TheirAutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from device_tests.attacks.apgd import APGD
from device_tests.attacks.autoattack import AutoAttack
from device_tests.images import from_8bit
from device_tests.perturbation import Norm
from keys.errors import InputError

NORMS = [(Norm.LINF, "Linf", 10 / 255), (Norm.L2, "L2", 0.35)]


@pytest.fixture(scope="module")
def trained(sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network for the ten classes of Fashion-MNIST, with test images of which it gets most right."""
    images, labels = sample_images
    pixels = torch.from_numpy(from_8bit(images[:, None])).clone()
    truth = torch.from_numpy(labels.astype(np.int64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 64, 32), nn.GELU(), nn.Linear(32, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for start in range(0, 2000, 50):
            part = slice(start, start + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels[part]), truth[part]).backward()
            optimizer.step()
    return model.eval(), pixels[2000:2024], truth[2000:2024]


Trained = tuple[nn.Module, torch.Tensor, torch.Tensor]


@pytest.mark.parametrize(("norm", "their_norm", "epsilon"), NORMS)
def test_candidates_equal_those_of_the_authors_class(
    trained: Trained, norm: Norm, their_norm: str, epsilon: float
) -> None:
    model, images, labels = trained
    theirs = TheirAutoAttack(model, norm=their_norm, eps=epsilon, seed=3, version="standard")
    # The standard version but for its length, which the class does not leave to the user.
    shared = {"n_iter": 10, "norm": their_norm, "eps": epsilon, "device": "cpu", "logger": theirs.logger}
    theirs.apgd = APGDAttack(model, **shared)
    theirs.apgd_targeted = APGDAttack_targeted(model, n_target_classes=9, **shared)
    theirs.fab.n_iter, theirs.square.n_queries = 10, 100
    trace = sys.gettrace()
    try:
        expected, _ = theirs.run_standard_evaluation(images, labels)
    finally:
        sys.settrace(trace)
    ours = AutoAttack(steps=10, queries=100, norm=norm).generate(model, images, labels, epsilon=epsilon, seed=3)
    fooled = model(ours).argmax(1) != labels
    assert 0.3 < fooled.float().mean() < 1  # some were fooled by the first attack, some went through all four
    assert torch.equal(fooled, model(expected).argmax(1) != labels)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("norm", "their_norm", "epsilon"), NORMS)
def test_apgd_equals_the_authors(trained: Trained, norm: Norm, their_norm: str, epsilon: float) -> None:
    model, images, labels = trained
    with torch.random.fork_rng(), torch.no_grad():
        theirs = APGDAttack(model, n_iter=20, norm=their_norm, eps=epsilon, seed=3)
        fooled = model(theirs.perturb(images, labels)).argmax(1) != labels
    made = APGD(steps=20, norm=norm).generate(model, images, labels, epsilon=epsilon, seed=3)
    # The highest loss is no success for an image here and there whose loss rose while it stayed right.
    assert ((model(made).argmax(1) != labels) != fooled).sum() <= 1
    targeted = APGD("targeted", steps=20, norm=norm).generate(model, images, labels, epsilon=epsilon, seed=3)
    changed = (targeted != images).flatten(1).any(1)
    assert torch.equal(model(targeted).argmax(1) != labels, changed | (model(images).argmax(1) != labels))


def test_tracing_goes_on(trained: Trained) -> None:
    model, images, labels = trained
    calls: list[str] = []

    def trace(frame: object, event: str, argument: object) -> None:
        calls.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        AutoAttack(steps=2, targets=1, queries=2).generate(model, images[:2], labels[:2], epsilon=0.01, seed=0)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert calls


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_leave_out_what_has_no_value(classes: int) -> None:
    # Logits that a brighter or darker image turns round, so that every image can be fooled.
    class Brightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            total = 20 * (images.mean(dim=(1, 2, 3)) - 0.5)
            others = [-4 - index + 0.1 * total for index in range(classes - 2)]
            return torch.stack([total, -total, *others], dim=1)

    images = torch.full((4, 1, 10, 10), 0.52)
    labels = torch.zeros(4, dtype=torch.int64)
    attack = AutoAttack(steps=5, targets=9, queries=5)
    made = attack.generate(Brightness(), images, labels, epsilon=0.05, seed=0)
    assert (Brightness()(made).argmax(1) == 1).all()
    if classes < 4:
        with pytest.raises(InputError, match=f"has {classes}"):
            APGD("targeted").generate(Brightness(), images, labels, epsilon=0.05, seed=0)


def test_an_image_that_nothing_fools_comes_back_unchanged(trained: Trained) -> None:
    model, images, labels = trained
    attack = AutoAttack(steps=5, targets=1, queries=5)
    made = attack.generate(model, images, labels, epsilon=1e-4, seed=0)
    fooled = model(made).argmax(1) != labels
    assert torch.equal(made[~fooled], images[~fooled])


def test_an_image_size_that_square_cannot_tile_is_refused(trained: Trained) -> None:
    model, images, labels = trained
    with pytest.raises(InputError, match="12×12"):
        AutoAttack(norm=Norm.L2).generate(model, images[..., :12, :12], labels, epsilon=0.5, seed=0)
