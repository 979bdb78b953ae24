"""First-order differences of images, with a gradient that is finite everywhere."""

from __future__ import annotations

import torch
from torch.nn import functional


def forward_differences(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to the next row and to the next column, each N×C×H×W; 0 at the last row and column."""
    down = functional.pad(images[:, :, 1:] - images[:, :, :-1], (0, 0, 0, 1))
    across = functional.pad(images[:, :, :, 1:] - images[:, :, :, :-1], (0, 1))
    return down, across


def lengths(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """√(down² + across²), elementwise. Its gradient at 0 is 0, where the root's own would be infinite."""
    squared = down**2 + across**2
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
