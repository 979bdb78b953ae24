"""How near images N×C×H×W come to their references: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from keys.errors import InputError

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # for values in [0, 1]


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image N×C×H×W in [0, 1] against its reference, N; inf where equal."""
    return -10 * torch.log10((images - references).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image N×C×H×W in [0, 1] with its reference, N, at most 1.

    Wang, Bovik, Sheikh and Simoncelli (2004), eq. 13, with their 11×11 Gaussian window of σ = 1.5, K₁ = 0.01 and
    K₂ = 0.03; the mean over all places where the window fits, and over channels. Raises :class:`InputError` for images
    smaller than the window.
    """
    if images.shape != references.shape or min(images.shape[2:]) < _WINDOW:
        raise InputError(
            f"SSIM compares images of one shape and at least {_WINDOW}×{_WINDOW} pixels, not {tuple(images.shape)} and "
            f"{tuple(references.shape)}."
        )
    x, y = images.double(), references.double()
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x, variance_y = _smoothed(x * x) - mean_x**2, _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    spread = (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return (likeness / spread).mean(dim=(1, 2, 3)).float()


def _smoothed(images: Tensor) -> Tensor:
    place = torch.arange(_WINDOW, dtype=images.dtype) - _WINDOW // 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    line = line / line.sum()
    flat = images.flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view(
        *images.shape[:2], images.shape[2] - _WINDOW + 1, images.shape[3] - _WINDOW + 1
    )
