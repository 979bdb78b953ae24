"""PGD: projected gradient ascent on the cross-entropy from a random start (Madry et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches, linf_ball, loss_gradient


@dataclass(frozen=True)
class PGD:
    """L∞ PGD: ``steps`` steps of ``reach``·ε/``steps`` each, from a uniform start in the ball; the last iterate.

    ``reach`` = 2.5 lets the iterate cross the ball from any start and still settle (Madry et al.).
    """

    steps: int = 40
    reach: float = 2.5

    @property
    def name(self) -> str:
        """``"pgd"``."""
        return "pgd"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"PGD, L∞, {self.steps} steps of {self.reach:g}·ε/{self.steps}, one random start"

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
        """Candidates by x ← clip(x + s·sign ∇ₓL); see :class:`~device_tests.attacks.attack.Attack`."""
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.empty_like(images)
        step = self.reach * epsilon / self.steps
        with at_rest(model):
            for part in batches(images):
                clean, truth = images[part], labels[part]
                low, high = linf_ball(clean, epsilon)
                # Drawn on the CPU, so that the start is the same on every device.
                start = torch.rand(clean.shape, generator=generator).to(clean) * 2 - 1
                x = (clean + epsilon * start).clamp(low, high)
                for _ in range(self.steps):
                    x = (x + step * loss_gradient(model, x, truth).sign()).clamp(low, high)
                    if progress is not None:
                        progress(len(truth))
                candidates[part] = x
        return candidates
