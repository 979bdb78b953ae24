"""Networks over volumes: shapes, which patches a patch's logits depend on, and the two rules for one prediction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from factory.volumization.layers import Layers
from factory.volumization.networks import AGGREGATES, PatchNetwork, build_network
from keys.errors import InputError

KINDS = ("vgg", "resnet", "efficientnet")


def network(kind: str, depth_kernel: int | None = None, **changes: int) -> PatchNetwork:
    torch.manual_seed(0)
    sizes = {"channels": 1, "patches": 4, "side": 14, "classes": 5, "width": 4, **changes}
    return build_network(kind, depth_kernel=depth_kernel, **sizes).eval()


def volume(patches: int = 4, side: int = 14) -> torch.Tensor:
    return torch.rand(2, 1, patches, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [4, 7, 8, 14, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_for_every_patch(kind: str, side: int) -> None:
    built = network(f"{kind}3d", side=side)
    assert built.patch_logits(volume(side=side)).shape == (2, 4, 5)
    assert built(volume(side=side)).shape == (2, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_control_takes_plain_images(kind: str) -> None:
    built = network(f"{kind}2d", patches=1, side=28)
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(built(images), built.patch_logits(images)[:, 0])
    assert not [module for module in built.modules() if isinstance(module, (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d))]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_as_deep_as_said_and_parameters_follow(kind: str) -> None:
    def kernels(built: PatchNetwork) -> int:
        return sum(m.weight.numel() for m in built.features.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))

    plain = kernels(network(f"{kind}2d", patches=1))
    whole, three, alone = (kernels(network(f"{kind}3d", depth)) for depth in (None, 3, 1))
    assert alone == plain
    # The convolutions of squeeze and excitation see one patch in all of them.
    assert plain < three < whole
    if kind != "efficientnet":
        assert (three, whole) == (3 * plain, 4 * plain)


def dependence(built: PatchNetwork, patches: int) -> torch.Tensor:
    """Whether logits of patch i depend on patch j: bool N×N."""
    leaf = volume(patches).requires_grad_(True)
    rows = []
    for patch in range(patches):
        (gradient,) = torch.autograd.grad(built.patch_logits(leaf)[:, patch].square().sum(), leaf)
        rows.append(gradient.abs().sum((0, 1, 3, 4)) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_depth_of_one_patches_stay_apart_and_else_they_meet(kind: str) -> None:
    assert torch.equal(dependence(network(f"{kind}3d", 1), 4), torch.eye(4, dtype=torch.bool))
    assert dependence(network(f"{kind}3d"), 4).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_padding_is_that_of_same(depth: int) -> None:
    torch.manual_seed(0)
    made = Layers(depth).convolution(1, 3, 3)
    (convolution,) = [module for module in made.modules() if isinstance(module, nn.Conv3d)]
    same = nn.Conv3d(1, 3, (depth, 3, 3), padding="same", bias=False)
    same.weight = convolution.weight
    torch.testing.assert_close(made(volume()), same(volume()))


def test_the_two_rules_for_one_prediction() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    torch.testing.assert_close(AGGREGATES["mean-logits"](logits), torch.tensor([[2 / 3, 2 / 3, 0.0]]))
    found = AGGREGATES["mean-probabilities"](logits).softmax(1)
    torch.testing.assert_close(found, logits.softmax(2).mean(1))
    # One patch with huge logits decides the mean of logits, but has one vote of three among probabilities.
    loud = logits.clone()
    loud[:, 0, 0] = 1000
    assert AGGREGATES["mean-logits"](loud).argmax() == 0
    assert AGGREGATES["mean-probabilities"](10 * loud).argmax() == 1
    assert torch.isfinite(AGGREGATES["mean-probabilities"](loud)).all()


def test_the_rule_is_the_one_that_was_asked_for() -> None:
    for rule, aggregate in AGGREGATES.items():
        torch.manual_seed(0)
        built = build_network("vgg3d", channels=1, patches=4, side=14, classes=5, width=4, aggregate=rule).eval()
        torch.testing.assert_close(built(volume()), aggregate(built.patch_logits(volume())))


def test_refuses_networks_that_are_none() -> None:
    good = {"channels": 1, "patches": 4, "side": 14, "classes": 10}
    for kind in ("vit", "alexnet3d", "vgg", "vgg4d", "3d"):
        with pytest.raises(InputError, match="no network"):
            build_network(kind, **good)
    for wrong in ({"classes": 1}, {"side": 0}, {"patches": 0}, {"width": 0}):
        with pytest.raises(InputError, match="or more"):
            build_network("vgg3d", **{**good, **wrong})
    for depth in (0, 5):
        with pytest.raises(InputError, match="spans 1 to 4 patches"):
            build_network("vgg3d", depth_kernel=depth, **good)
    with pytest.raises(InputError, match="plain images"):
        build_network("vgg2d", **good)
    with pytest.raises(InputError, match="no rule 'vote'"):
        build_network("vgg3d", aggregate="vote", **good)
