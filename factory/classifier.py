"""The models that the factory trains: images in [0, 1] to logits, with the key's shuffle inside.

Order: the shuffle acts on the image in [0, 1], then the result is normalised channel by channel, as the paper
trains on encrypted *images* (Eq. 1: f(t(x, K))). Shuffling after normalisation would give the same only if all
channels had the same mean and standard deviation, since the shuffle moves values between channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factory.block_shuffle import BlockShuffle


class ImageClassifier(nn.Module):
    """Keyed shuffle (if any), normalisation, ViT: float N×C×H×W in [0, 1] to logits N×K."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, vit: nn.Module, mean: Sequence[float], std: Sequence[float], shuffle: BlockShuffle | None = None
    ) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.vit = vit
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of images N×C×H×W in [0, 1]."""
        if self.shuffle is not None:
            images = self.shuffle(images)
        return self.vit((images - self.mean) / self.std)
