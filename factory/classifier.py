"""The models that the factory trains: images in [0, 1] to logits, with the key's transform inside.

Order: the transform acts on the image in [0, 1], then the result is normalised channel by channel, as the paper
trains on encrypted *images* (Eq. 1: f(t(x, K))). Shuffling after normalisation would give the same only if all
channels had the same mean and standard deviation, since the shuffle moves values between channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factory.attractors import Attractors


class ImageClassifier(nn.Module):
    """Keyed transform (if any), normalisation, network: float N×C×H×W in [0, 1] to logits N×K; plus attractors."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], transform: nn.Module | None = None,
        attractors: Attractors | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transform = transform
        self.attractors = attractors
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of images N×C×H×W in [0, 1]."""
        logits = self.network(self.inputs(images))
        return logits if self.attractors is None else logits + self.attractors(images)

    def inputs(self, images: Tensor) -> Tensor:
        """What the network sees of images N×C×H×W in [0, 1]: N×C×H×W, or volumes N×C×D×H×W."""
        if self.transform is not None:
            images = self.transform(images)
        mean, std = self.mean, self.std
        if images.ndim == 5:
            mean, std = mean.unsqueeze(2), std.unsqueeze(2)
        return (images - mean) / std
