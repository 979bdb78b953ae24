"""The parametric bypass: it finds a known permutation, agrees with the target, and makes attacks carry over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.bypass import BlockMap, Bypass, StandIn, fit_bypass
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.crafting import content_key
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from exporters.run_torch import TorchRuntime
from factory.block_shuffle import BlockShuffle
from keys.errors import InputError

PERMUTATION = np.random.default_rng(1).permutation(16)
EPSILON = Perturbation(Norm.LINF, 24 / 255)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """1,200 random images of 8×8: every position of a block tells something of its own."""
    return np.random.default_rng(0).integers(0, 256, (1200, 1, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """A linear toy of five classes, the same everywhere."""
    weight = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    model[1].weight.data = torch.from_numpy(weight)
    model[1].bias.data.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def target(base: nn.Module) -> TorchRuntime:
    """The base behind a keyed shuffle of 4×4 blocks, which the attacker does not know."""
    return TorchRuntime(nn.Sequential(BlockShuffle(PERMUTATION, channels=1, block_size=4), base))


def fitted(base: nn.Module, target: TorchRuntime, images: np.ndarray, kind: StandIn, **changes: object) -> Bypass:
    settings: dict = {"block_size": 4, "kind": kind, "scores": True, "steps": 150, "seed": 0, **changes}
    return fit_bypass(base, target, images[:800], **settings)


def fooled_by(model: nn.Module, target: TorchRuntime, images: np.ndarray) -> float:
    """How much of what MI-FGSM makes on ``model`` changes the target's answer, in 8 bits."""
    before = predict(target, images)
    x, labels = torch.from_numpy(from_8bit(images)), torch.from_numpy(before)
    candidates = MomentumFGSM(steps=5).generate(model, x, labels, epsilon=EPSILON.radius, seed=0)
    return float((predict(target, EPSILON.to_8bit(candidates.numpy(), images)) != before).mean())


def test_a_soft_permutation_finds_the_key(base: nn.Module, target: TorchRuntime, images: np.ndarray) -> None:
    heard = [0]

    def progress(done: int) -> None:
        heard[0] += done

    bypass = fitted(base, target, images, StandIn.PERMUTATION, progress=progress)
    first = bypass.module[0]
    assert isinstance(first, BlockMap)
    assert first.matrix.argmax(dim=1).tolist() == PERMUTATION.tolist()
    assert torch.allclose(first.matrix.sum(dim=0), torch.ones(16), atol=1e-3)
    assert bypass.agreement.n == 80
    assert bypass.agreement.value > 0.9
    assert bypass.queries == 800
    assert heard[0] == 150 * 64


@pytest.mark.parametrize("kind", list(StandIn), ids=lambda kind: kind.name)
def test_attacks_through_the_stand_in_carry_over(
    base: nn.Module, target: TorchRuntime, images: np.ndarray, kind: StandIn
) -> None:
    bypass = fitted(base, target, images, kind, steps=300)
    judged = images[1000:]
    assert fooled_by(bypass.module, target, judged) > fooled_by(base, target, judged) + 0.2


def test_labels_alone_are_enough_but_tell_less(base: nn.Module, target: TorchRuntime, images: np.ndarray) -> None:
    scores = fitted(base, target, images, StandIn.LINEAR)
    labels = fitted(base, target, images, StandIn.LINEAR, scores=False)
    before = float((predict(TorchRuntime(base), images) == predict(target, images)).mean())
    assert before + 0.05 < labels.agreement.value < scores.agreement.value
    assert labels.description != scores.description


def test_the_seed_alone_decides_and_the_base_is_left_as_it_was(
    base: nn.Module, target: TorchRuntime, images: np.ndarray
) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    bypasses = [fitted(base, target, images, StandIn.DISTILLED, steps=3, seed=seed) for seed in (1, 1, 2)]
    # A source's cache key covers all that was fitted.
    keys = [content_key(bypass.module, images[:2], np.zeros(2)) for bypass in bypasses]
    assert keys[0] == keys[1] != keys[2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
    assert not torch.equal(bypasses[0].module[1][1].weight, base[1].weight)


def test_what_cannot_be_fitted_is_refused(base: nn.Module, target: TorchRuntime, images: np.ndarray) -> None:
    with pytest.raises(InputError, match="Blocks of 3 pixels"):
        fitted(base, target, images, StandIn.LINEAR, block_size=3)
    with pytest.raises(InputError, match="at least 128 images"):
        fitted(base, target, images[:100], StandIn.LINEAR)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(InputError, match="not all finite"):
        fitted(base, TorchRuntime(broken.eval()), images, StandIn.LINEAR)
    with pytest.raises(InputError, match="diverged"):
        fitted(broken, target, images, StandIn.LINEAR)
