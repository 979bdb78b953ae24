"""BIM: FGSM in small steps (Kurakin et al., ICLR 2017 workshop)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import gradients_in, loss_gradient
from device_tests.perturbation import Norm


@dataclass(frozen=True)
class BIM:
    """``steps`` steps of ``reach``·ε/``steps`` from the clean image, no momentum.

    The paper's step is one 8-bit level, with a quarter more steps than reach the ball's edge: ``reach`` 1.25.
    """

    steps: int = 10
    reach: float = 1.25
    norm: Norm = Norm.LINF
    bf16: bool = False

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"bim"`` or ``"bim-l2"``."""
        return named("bim", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"BIM, {WORDS[self.norm]}, {self.steps} steps of {self.reach:g}·ε/{self.steps}" + gradients_in(self.bf16)

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
        """Candidates by Kurakin et al.'s basic iterative method; see :class:`~device_tests.attacks.attack.Attack`.

        Nothing is drawn at random: ``seed`` changes nothing.
        """
        gradient = partial(loss_gradient, model, bf16=self.bf16)
        lengths = [self.reach / self.steps] * self.steps
        return ascend(
            model, images, labels, gradient, norm=self.norm, epsilon=epsilon, lengths=lengths, progress=progress
        )
