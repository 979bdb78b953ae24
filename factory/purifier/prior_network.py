"""The prior: small untrained hourglass networks, one per image, all of a batch computed in one go.

An hourglass of convolutions reproduces what is smooth and repeats itself long before it reproduces noise (Ulyanov,
Vedaldi and Lempitsky, *Deep Image Prior*, CVPR 2018); that is all that is asked of it here. Image b has weights of its
own, so nothing passes between images: the weights of all networks are one tensor B×P, and every layer is a convolution
in B groups.

Layers, at ``scales`` s = 1 … S, each convolution but the last followed by a normalisation per channel and image and a
leaky ReLU: down, 3×3 with stride 2, then 3×3; up, the features of s + 1 enlarged bilinearly and added to a 1×1
convolution of those of s, then 3×3; at last 1×1 at full size and a sigmoid. There is no path at full size around the
hourglass: noise would take it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from factory.seeds import derive_seed
from keys.errors import InputError

SMALLEST_SIDE, LARGEST_SIDE = 8, 256
_CODE_CHANNELS = 8
_CODE_SIZE = 0.1
_SLOPE = 0.1


@dataclass(frozen=True)
class PriorShape:
    """A network for images of ``channels`` × ``height`` × ``width`` pixels, ``features`` wide, ``scales`` deep.

    Raises :class:`InputError` for images too small for so many scales, or too large to be optimised image by image.
    """

    channels: int
    height: int
    width: int
    features: int
    scales: int

    def __post_init__(self) -> None:
        if not (min(self.height, self.width) >= SMALLEST_SIDE and max(self.height, self.width) <= LARGEST_SIDE):
            raise InputError(
                f"The purifier takes images of {SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side, not "
                f"{self.height}×{self.width}."
            )
        if min(self.sizes[-1]) < 2:
            raise InputError(
                f"Images of {self.height}×{self.width} pixels cannot be halved {self.scales} times; lower the "
                "purifier's scales."
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width at every scale, full size first."""
        found = [(self.height, self.width)]
        for _ in range(self.scales):
            found.append((math.ceil(found[-1][0] / 2), math.ceil(found[-1][1] / 2)))
        return tuple(found)

    @property
    def code(self) -> tuple[int, int, int]:
        """C×H×W of the code that a network starts from."""
        return (_CODE_CHANNELS, self.height, self.width)

    @property
    def layers(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of every weight of one network, in the order in which they stand in its P values."""
        found: list[tuple[str, tuple[int, ...]]] = []

        def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
            found.append((name, (outputs, inputs, side, side)))
            found.append((f"{name}.gain", (outputs,)))
            found.append((f"{name}.shift", (outputs,)))

        features = self.features
        for scale in range(1, self.scales + 1):
            convolution(f"down{scale}", _CODE_CHANNELS if scale == 1 else features, features, 3)
            convolution(f"flat{scale}", features, features, 3)
        for scale in range(self.scales - 1, 0, -1):
            convolution(f"skip{scale}", features, features, 1)
        for scale in range(self.scales - 1, -1, -1):
            convolution(f"up{scale}", features, features, 3)
        found.append(("out", (self.channels, features, 1, 1)))
        found.append(("out.shift", (self.channels,)))
        return tuple(found)

    @property
    def weights(self) -> int:
        """P, the number of weights of one network."""
        return sum(math.prod(shape) for _, shape in self.layers)


def first_weights(shape: PriorShape, seed: int) -> Tensor:
    """The untrained weights of one network, float32 P: He's normal for convolutions, gains 1, shifts 0."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "prior weights"))
    parts: list[Tensor] = []
    for name, size in shape.layers:
        if name.endswith(".gain"):
            parts.append(torch.ones(size))
        elif name.endswith(".shift"):
            parts.append(torch.zeros(size))
        else:
            spread = math.sqrt(2 / math.prod(size[1:]))
            parts.append(torch.randn(size, generator=generator) * spread)
    return torch.cat([part.flatten() for part in parts])


def first_code(shape: PriorShape, seed: int) -> Tensor:
    """The fixed code of one network, float32 C×H×W, uniform in [0, 0.1] as in the paper of the prior."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "prior code"))
    return torch.rand(shape.code, generator=generator) * _CODE_SIZE


def render(shape: PriorShape, weights: Tensor, codes: Tensor) -> Tensor:
    """The images B×C×H×W in (0, 1) that B networks give, differentiable in ``weights``.

    ``weights``: float32 B×P; ``codes``: float32 B×``shape.code``.
    """
    layers = _Layers(shape, weights)
    x = codes
    below: list[Tensor] = []
    for scale in range(1, shape.scales + 1):
        x = layers.block(f"down{scale}", x, stride=2)
        x = layers.block(f"flat{scale}", x)
        below.append(x)
    for scale in range(shape.scales - 1, -1, -1):
        x = F.interpolate(x, size=shape.sizes[scale], mode="bilinear", align_corners=False)
        if scale:
            x = x + layers.block(f"skip{scale}", below[scale - 1])
        x = layers.block(f"up{scale}", x)
    return torch.sigmoid(layers.convolution("out", x) + layers["out.shift"][:, :, None, None])


class _Layers:
    """The weights of B networks by name, each with B in front, and what is computed with them."""

    def __init__(self, shape: PriorShape, weights: Tensor) -> None:
        sizes = [math.prod(size) for _, size in shape.layers]
        parts = weights.split(sizes, dim=1)
        self._batch = len(weights)
        self._named = {
            name: part.reshape(self._batch, *size) for (name, size), part in zip(shape.layers, parts, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def convolution(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._named[name]
        batch, outputs, _, side, _ = weight.shape
        found = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), stride=stride, padding=side // 2, groups=batch
        )
        return found.view(batch, outputs, *found.shape[2:])

    def block(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        x = self.convolution(name, x, stride)
        batch, channels = x.shape[:2]
        gain, shift = self._named[f"{name}.gain"].flatten(), self._named[f"{name}.shift"].flatten()
        # As a batch of one with B·C channels this normalises each channel of each image by itself.
        flat = F.batch_norm(x.reshape(1, batch * channels, *x.shape[2:]), None, None, gain, shift, training=True)
        return F.leaky_relu(flat, _SLOPE).view_as(x)
