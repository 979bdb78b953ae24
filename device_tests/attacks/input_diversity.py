"""MI-DI-FGSM: momentum over gradients of randomly resized and padded images (Xie et al., CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import gradients_in, loss_gradient
from device_tests.attacks.resampling import resize_and_pad
from device_tests.perturbation import Norm


@dataclass(frozen=True)
class InputDiversity:
    """MI-FGSM in which, at every step, a share of the images is shrunk and padded with zeros before the model.

    ``smallest``: least side after resizing, as a share of the image's; ``share``: of the images that are changed at a
    step (the paper's p).
    """

    steps: int = 40
    momentum: float = 1.0
    reach: float = 4.0
    smallest: float = 0.7
    share: float = 1.0
    norm: Norm = Norm.LINF
    bf16: bool = False

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"mi-di"`` or ``"mi-di-l2"``."""
        return named("mi-di", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = (
            f"{self.steps} steps of {self.reach:g}·ε/{self.steps}, momentum {self.momentum:g}, {self.share:g} of the "
            f"images resized to {self.smallest:g} … 1 and padded"
        )
        return f"MI-DI-FGSM, {WORDS[self.norm]}, {words}" + gradients_in(self.bf16)

    @property
    def gradients_per_image(self) -> int:
        """One gradient per step."""
        return self.steps

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
        """Candidates by Dong et al., eq. 6 and 7, on transformed inputs (Xie et al.).

        See :class:`~device_tests.attacks.attack.Attack`.
        """
        generator = torch.Generator().manual_seed(seed)

        def transform(x: torch.Tensor) -> torch.Tensor:
            return resize_and_pad(x, self.smallest, self.share, generator)

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            return loss_gradient(model, x, truth, transform=transform, bf16=self.bf16)

        return ascend(
            model,
            images,
            labels,
            gradient,
            norm=self.norm,
            epsilon=epsilon,
            lengths=[self.reach / self.steps] * self.steps,
            momentum=self.momentum,
            progress=progress,
        )
