"""FGSM: one step of the whole radius along the gradient's sign (Goodfellow et al., ICLR 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import loss_gradient
from device_tests.perturbation import Norm


@dataclass(frozen=True)
class FGSM:
    """One step of length ε from the clean image; in L2 along the gradient itself (the fast gradient method)."""

    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"fgsm"`` or ``"fgsm-l2"``."""
        return named("fgsm", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"FGSM, {WORDS[self.norm]}, one step"

    @property
    def gradients_per_image(self) -> int:
        """One."""
        return 1

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
        """Candidates x + ε·sign ∇ₓL; see :class:`~device_tests.attacks.attack.Attack`.

        Nothing is drawn at random: ``seed`` changes nothing.
        """
        gradient = partial(loss_gradient, model)
        return ascend(
            model, images, labels, gradient, norm=self.norm, epsilon=epsilon, lengths=[1.0], progress=progress
        )
