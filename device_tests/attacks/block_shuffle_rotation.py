"""BSR: momentum over gradients of images cut into blocks, shuffled and turned (Wang et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import gradients_in, loss_gradient
from device_tests.attacks.resampling import shuffle_and_rotate_blocks
from device_tests.perturbation import Norm


@dataclass(frozen=True)
class BlockShuffleRotation:
    """MI-FGSM with the mean gradient over ``copies`` images of ``blocks``×``blocks`` shuffled and turned blocks.

    ``degrees``: largest angle either way. The paper has 2 blocks, 24 degrees and 20 copies over 10 steps.
    """

    steps: int = 10
    copies: int = 20
    blocks: int = 2
    degrees: float = 24.0
    momentum: float = 1.0
    reach: float = 1.0
    norm: Norm = Norm.LINF
    bf16: bool = False

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"mi-bsr"`` or ``"mi-bsr-l2"``."""
        return named("mi-bsr", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = (
            f"{self.steps} steps of {self.reach:g}·ε/{self.steps}, momentum {self.momentum:g}, {self.copies} copies of "
            f"{self.blocks}×{self.blocks} blocks, shuffled and turned by at most {self.degrees:g}°"
        )
        return f"BSR, {WORDS[self.norm]}, {words}" + gradients_in(self.bf16)

    @property
    def gradients_per_image(self) -> int:
        """One gradient per step and copy."""
        return self.steps * self.copies

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates after Wang et al.: one draw of blocks per copy, shared by the images of a batch.

        See :class:`~device_tests.attacks.attack.Attack`.
        """
        generator = torch.Generator().manual_seed(seed)

        def transform(x: torch.Tensor) -> torch.Tensor:
            return shuffle_and_rotate_blocks(x, self.blocks, self.degrees, generator)

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x)
            for _ in range(self.copies):
                total += loss_gradient(model, x, truth, transform=transform, bf16=self.bf16)
            return total

        return ascend(
            model,
            images,
            labels,
            gradient,
            norm=self.norm,
            epsilon=epsilon,
            lengths=[self.reach / self.steps] * self.steps,
            momentum=self.momentum,
            gradients_per_step=self.copies,
            progress=progress,
        )
