"""BSR: momentum over gradients of images cut into blocks, shuffled and turned (Wang et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from device_tests.attacks.ascent import Gradient
from device_tests.attacks.gradients import loss_gradient
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.resampling import shuffle_and_rotate_blocks


@dataclass(frozen=True)
class BlockShuffleRotation(MomentumFGSM):
    """MI-FGSM with the mean gradient over ``copies`` images of ``blocks``×``blocks`` shuffled and turned blocks.

    ``degrees``: largest angle either way. The paper has 2 blocks, 24 degrees and 20 copies over 10 steps.
    """

    copies: int = 20
    blocks: int = 2
    degrees: float = 24.0

    _SHORT: ClassVar[str] = "mi-bsr"
    _TITLE: ClassVar[str] = "BSR"

    def _details(self) -> tuple[str, ...]:
        words = f"{self.blocks}×{self.blocks} blocks, shuffled and turned by at most {self.degrees:g}°"
        return (f"{self.copies} copies of {words}",)

    def _gradients_per_step(self) -> int:
        return self.copies

    def _gradient(self, model: nn.Module, epsilon: float, generator: torch.Generator) -> Gradient:
        # One draw of blocks per copy, shared by the images of a batch.
        def transform(x: torch.Tensor) -> torch.Tensor:
            return shuffle_and_rotate_blocks(x, self.blocks, self.degrees, generator)

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x)
            for _ in range(self.copies):
                total += loss_gradient(model, x, truth, transform=transform, bf16=self.bf16)
            return total

        return gradient
