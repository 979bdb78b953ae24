"""Small convolutional networks over volumes (section 4.2), and the same networks over plain images as a control.

Every convolution of k×k becomes one of k×k×N, with N the number of patches, or of k×k×``depth_kernel`` (1×1 too, as the
paper has it): the cost of a network grows with it. The fully connected layers map the features of every patch alike, so
that a volume (B, C, N, h, w) has patch logits (B, N, k).

How N×k logits become one prediction is not in the paper. Two rules: ``mean-logits``, the mean over the patches, and
``mean-probabilities``, the logarithm of the mean of the patches' softmax, in which one patch cannot outvote the others
by the size of its logits.

>>> network = build_network("vgg3d", channels=1, patches=4, side=14, classes=10)
>>> network.patch_logits(torch.zeros(2, 1, 4, 14, 14)).shape
torch.Size([2, 4, 10])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from factory.recipes.part import Trait
from factory.volumization.layers import Layers, log_mean_probability, per_patch, plane_mean
from keys.errors import InputError

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean-logits": lambda logits: logits.mean(1),
    "mean-probabilities": log_mean_probability,
}

_EXPANSION = 4
_SQUEEZE = 4


class PatchNetwork(nn.Module):
    """Features, then fully connected layers for each patch, then the rule that makes one prediction of all."""

    def __init__(self, features: nn.Module, head: nn.Module, aggregate: str) -> None:
        super().__init__()
        if aggregate not in AGGREGATES:
            raise InputError(f"There is no rule {aggregate!r} for patch logits; there are {', '.join(AGGREGATES)}.")
        self.features, self.head, self.aggregate = features, head, aggregate
        self.TRAITS = frozenset({Trait.IMAGES})
        self.volume: tuple[int, int] | None = None
        """Patches and their side, where the network is made for volumes of these."""

    def extra_repr(self) -> str:
        """The rule, which no tensor holds."""
        return f"aggregate={self.aggregate}"

    def patch_logits(self, volume: Tensor) -> Tensor:
        """Logits (B, N, k) of a normalised volume (B, C, N, h, w); (B, 1, k) of plain images (B, C, H, W)."""
        return self.head(per_patch(self.features(volume)))

    def forward(self, volume: Tensor) -> Tensor:
        """Logits (B, k) of a normalised volume (B, C, N, h, w), or of plain images (B, C, H, W) for a 2D network."""
        return AGGREGATES[self.aggregate](self.patch_logits(volume))


def build_network(
    kind: str,
    *,
    channels: int,
    patches: int,
    side: int,
    classes: int,
    width: int = 16,
    depth_kernel: int | None = None,
    aggregate: str = "mean-logits",
) -> PatchNetwork:
    """A network of ``kind`` ``vgg3d``, ``resnet3d`` or ``efficientnet3d`` over volumes, or its 2D control.

    The controls are ``vgg2d``, ``resnet2d`` and ``efficientnet2d``: they take images of ``side``×``side`` pixels
    (B, C, H, W), ``patches`` must be 1 and ``depth_kernel`` is not used. For the others ``side`` is that of a patch.
    ``width``: channels of the first stage, doubled at each of the two that follow. ``depth_kernel``: patches that a
    kernel spans, 1 to N; N if it is ``None``, as in the paper. ``aggregate``: see the module. Raises
    :class:`InputError` for another kind or rule, or numbers outside of these.
    """
    name, dimensions = kind[:-2], kind[-2:]
    if name not in _KINDS or dimensions not in ("2d", "3d"):
        known = ", ".join(f"{name}{dimensions}" for dimensions in ("3d", "2d") for name in _KINDS)
        raise InputError(f"There is no network {kind!r}; there are {known}.")
    if min(channels, patches, side, width) < 1 or classes < 2:
        raise InputError(
            f"A network needs one channel, patch, pixel and width or more, and two classes or more; got {channels}, "
            f"{patches}, {side}, {width} and {classes}."
        )
    if dimensions == "2d":
        if patches != 1 or depth_kernel is not None:
            raise InputError(f"{kind} takes plain images: one patch and no depth kernel, not {patches}.")
        return _KINDS[name](Layers(None), channels, side, classes, width, aggregate)
    depth = patches if depth_kernel is None else depth_kernel
    if not 1 <= depth <= patches:
        raise InputError(f"A kernel spans 1 to {patches} patches of {patches}, not {depth}.")
    return _KINDS[name](Layers(depth), channels, side, classes, width, aggregate)


def _vgg(make: Layers, channels: int, side: int, classes: int, width: int, aggregate: str) -> PatchNetwork:
    """Three stages of two 3×3 convolutions and a pooling (after Simonyan & Zisserman, 2015), batch norm between."""
    parts: list[nn.Module] = []
    inputs = channels
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(2):
            parts += [make.convolution(inputs, outputs, 3), make.norm(outputs), nn.ReLU()]
            inputs = outputs
        if side >= 2:
            parts.append(make.pool())
            side //= 2
    hidden = 8 * width
    head = nn.Sequential(nn.Linear(inputs * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return PatchNetwork(nn.Sequential(*parts), head, aggregate)


def _resnet(make: Layers, channels: int, side: int, classes: int, width: int, aggregate: str) -> PatchNetwork:
    """Three stages of one basic block (after He et al., 2016), the later two at half the size of the one before."""
    parts: list[nn.Module] = [make.convolution(channels, width, 3), make.norm(width), nn.ReLU()]
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        stride = 2 if stage and side >= 2 else 1
        side //= stride
        parts.append(_Residual(make, inputs, outputs, stride))
        inputs = outputs
    return PatchNetwork(nn.Sequential(*parts, _PlaneMean()), nn.Linear(inputs, classes), aggregate)


def _efficientnet(make: Layers, channels: int, side: int, classes: int, width: int, aggregate: str) -> PatchNetwork:
    """Three stages of two inverted bottlenecks (MBConv, after Tan & Le, 2019) with squeeze and excitation."""
    parts: list[nn.Module] = [make.convolution(channels, width, 3), make.norm(width), nn.SiLU()]
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        stride = 2 if stage and side >= 2 else 1
        side //= stride
        parts += [_Bottleneck(make, inputs, outputs, stride), _Bottleneck(make, outputs, outputs, 1)]
        inputs = outputs
    return PatchNetwork(nn.Sequential(*parts, _PlaneMean()), nn.Linear(inputs, classes), aggregate)


_KINDS: dict[str, Callable[[Layers, int, int, int, int, str], PatchNetwork]] = {
    "vgg": _vgg,
    "resnet": _resnet,
    "efficientnet": _efficientnet,
}


class _PlaneMean(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return plane_mean(features)


class _Residual(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            make.convolution(inputs, outputs, 3, stride=stride),
            make.norm(outputs),
            nn.ReLU(),
            make.convolution(outputs, outputs, 3),
            make.norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(make.convolution(inputs, outputs, 1, stride=stride), make.norm(outputs))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.body(features) + self.shortcut(features))


class _Bottleneck(nn.Module):
    """MBConv: wider by a 1×1 convolution, a depthwise 3×3 one, squeeze and excitation, and narrower again."""

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = _EXPANSION * inputs
        self.before = nn.Sequential(
            make.convolution(inputs, wide, 1),
            make.norm(wide),
            nn.SiLU(),
            make.convolution(wide, wide, 3, stride=stride, groups=wide),
            make.norm(wide),
            nn.SiLU(),
        )
        # Squeezed over the plane of each patch, not over the volume: else the weights would mix patches that the
        # kernels keep apart.
        alone = Layers(None if make.depth is None else 1)
        squeezed = max(1, inputs // _SQUEEZE)
        self.excitation = nn.Sequential(
            alone.convolution(wide, squeezed, 1, bias=True),
            nn.SiLU(),
            alone.convolution(squeezed, wide, 1, bias=True),
            nn.Sigmoid(),
        )
        self.after = nn.Sequential(make.convolution(wide, outputs, 1), make.norm(outputs))
        self.residual = inputs == outputs and stride == 1

    def forward(self, features: Tensor) -> Tensor:
        inside = self.before(features)
        result = self.after(inside * self.excitation(plane_mean(inside)))
        return result + features if self.residual else result
