"""Layers for volumes (B, C, N, h, w) and for images (B, C, h, w), under one set of names.

A network is written once and built for either: :class:`Layers` with a depth gives 3D layers with kernels of k×k×depth
(section 4.2), without one the plain 2D layers that they come from. The axis of the N patches keeps its length in all
of them (Eq. 9): strides and pooling halve height and width only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layers:
    """``depth``: how many patches a kernel spans, 1 or more; ``None`` for plain 2D layers.

    With a depth of 1 no layer sees more than one patch, pooling included.
    """

    depth: int | None

    def convolution(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> nn.Module:
        """A convolution of ``kernel`` (odd) pixels on a side, padded so that with stride 1 no axis changes."""
        half = kernel // 2
        if self.depth is None:
            return nn.Conv2d(inputs, outputs, kernel, stride, half, groups=groups, bias=bias)
        convolution = nn.Conv3d(
            inputs,
            outputs,
            (self.depth, kernel, kernel),
            (1, stride, stride),
            (self.depth // 2, half, half),
            groups=groups,
            bias=bias,
        )
        return convolution if self.depth % 2 else nn.Sequential(convolution, FromSecond())

    def norm(self, channels: int) -> nn.Module:
        """Batch norm."""
        return nn.BatchNorm2d(channels) if self.depth is None else nn.BatchNorm3d(channels)

    def pool(self) -> nn.Module:
        """Max pooling that halves height and width; over three patches at a time where kernels span as many."""
        if self.depth is None:
            return nn.MaxPool2d(2)
        span = 3 if self.depth >= 3 else 1
        return nn.MaxPool3d((span, 2, 2), (1, 2, 2), (span // 2, 0, 0))


class FromSecond(nn.Module):
    """Drops the first place of the depth.

    An even kernel padded by half of itself on both sides gives one place too many. What is left is padding that has its
    odd place behind, as torch and Core ML call "same"; written so, because no exporter pads a convolution unevenly.
    """

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, N + 1, h, w) to (B, C, N, h, w)."""
        return volume[:, :, 1:]


def per_patch(features: Tensor) -> Tensor:
    """Features (B, C, N, h, w) as (B, N, C·h·w), or (B, C, h, w) as (B, 1, C·h·w)."""
    if features.ndim == 4:
        return features.flatten(1).unsqueeze(1)
    return features.transpose(1, 2).flatten(2)


def plane_mean(features: Tensor) -> Tensor:
    """The mean over height and width, which stay as axes of length 1; patches are never averaged."""
    return features.mean((-2, -1), keepdim=True)


def log_mean_probability(logits: Tensor) -> Tensor:
    """Logarithm (B, k) of the mean over N patches of the softmax of ``logits`` (B, N, k)."""
    logs = logits - torch.logsumexp(logits, 2, keepdim=True)
    # Softmax takes no notice of what is added to all classes, so the logarithm of N is left out.
    return torch.logsumexp(logs, 1)
