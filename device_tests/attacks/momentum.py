"""MI-FGSM: iterative FGSM with momentum, made to transfer (Dong et al., CVPR 2018).

As published. Its steps only just reach the edge of the ball, so that it is weaker than PGD on its own source
(up to 15 points at ε = 8/255) while its images often transfer better: run it beside PGD, not instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches, linf_ball, loss_gradient


@dataclass(frozen=True)
class MomentumFGSM:
    """L∞ MI-FGSM: ``steps`` steps of ``reach``·ε/``steps`` along the sign of the accumulated gradient.

    It starts at the clean image. ``momentum`` is the paper's decay factor μ; 1.0 adds up all gradients, its best
    setting. ``reach`` = 1 is the paper's step, with which the ball's edge is reached at the last step only.
    """

    steps: int = 10
    momentum: float = 1.0
    reach: float = 1.0

    @property
    def name(self) -> str:
        """``"mi-fgsm"``."""
        return "mi-fgsm"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"MI-FGSM, L∞, {self.steps} steps of {self.reach:g}·ε/{self.steps}, momentum {self.momentum:g}"

    @property
    def gradients_per_image(self) -> int:
        """One gradient per step."""
        return self.steps

    @torch.no_grad()
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
        """Candidates by Dong et al., eq. 6 and 7; see :class:`~device_tests.attacks.attack.Attack`.

        Nothing is drawn at random: ``seed`` changes nothing.
        """
        candidates = torch.empty_like(images)
        step = self.reach * epsilon / self.steps
        with at_rest(model):
            for part in batches(images):
                clean, truth = images[part], labels[part]
                low, high = linf_ball(clean, epsilon)
                x, velocity = clean, torch.zeros_like(clean)
                for _ in range(self.steps):
                    gradient = loss_gradient(model, x, truth)
                    norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
                    # A zero gradient adds nothing instead of dividing by zero.
                    unit = torch.where(norm > 0, gradient / norm, torch.zeros_like(gradient))
                    velocity = self.momentum * velocity + unit
                    x = (x + step * velocity.sign()).clamp(low, high)
                    if progress is not None:
                        progress(len(truth))
                candidates[part] = x
        return candidates
