"""Total variation minimisation as a defence (Guo et al., ICLR 2018), without their random choice of pixels.

The image u that makes ½‖u − x‖² + weight·TV(u) smallest, by ``steps`` of Chambolle's dual projection (Journal of
Mathematical Imaging and Vision 20, 2004); differentiable through all steps, so that it needs no BPDA.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from device_tests.defences.differences import forward_differences, lengths
from keys.errors import InputError

_TAU = 0.125
"""Step of the dual ascent; up to 1/8 it is proved to converge."""


class TotalVariation(nn.Module):
    """Images float N×C×H×W in [0, 1] → the same, smoothed; each channel by itself.

    ``weight`` ≥ 0, on the scale of [0, 1], where 0 is no defence; ``steps`` ≥ 1. Raises :class:`InputError` else.
    """

    def __init__(self, weight: float = 0.1, steps: int = 30) -> None:
        super().__init__()
        if not weight >= 0 or steps < 1:
            raise InputError(f"Total variation takes a weight of at least 0 and a step, not {weight} and {steps}.")
        self.weight, self.steps = weight, steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images with less variation; within the range of the given ones up to rounding."""
        if self.weight == 0:
            return images
        down, across = torch.zeros_like(images), torch.zeros_like(images)
        for _ in range(self.steps):
            upward, sideways = forward_differences(_divergence(down, across) - images / self.weight)
            shrink = 1 + _TAU * lengths(upward, sideways)
            down, across = (down + _TAU * upward) / shrink, (across + _TAU * sideways) / shrink
        return images - self.weight * _divergence(down, across)

    def extra_repr(self) -> str:
        """The parameters: they are the whole defence."""
        return f"weight={self.weight}, steps={self.steps}"


def _divergence(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Minus the adjoint of the forward differences, whose last row and column are 0."""
    rows, columns = down[:, :, :-1], across[:, :, :, :-1]
    vertical = functional.pad(rows, (0, 0, 0, 1)) - functional.pad(rows, (0, 0, 1, 0))
    return vertical + functional.pad(columns, (0, 1)) - functional.pad(columns, (1, 0))
