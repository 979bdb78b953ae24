"""What the purifier is compared with, and by what: JPEG, total-variation denoising, PSNR and SSIM.

Plain functions of images N×C×H×W; none of them asks a classifier.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from keys.errors import InputError

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # for values in [0, 1]
_STEP = 0.125  # Chambolle's theorem 3.1: it converges up to 1/8


def jpeg(images: np.ndarray, quality: int = 75) -> np.ndarray:
    """Images uint8 N×C×H×W written as JPEG at ``quality`` (1 to 95) and read again, by Pillow; uint8 alike."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"JPEG takes 8-bit images N×C×H×W with 1 or 3 channels, not {images.dtype} {images.shape}.")
    if not 1 <= quality <= 95:
        raise InputError(f"A JPEG's quality is from 1 to 95, not {quality}.")
    found = np.empty_like(images)
    for index, image in enumerate(images):
        stream = io.BytesIO()
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(stream, "JPEG", quality=quality)
        read = np.asarray(Image.open(io.BytesIO(stream.getvalue())))
        found[index] = read[None] if read.ndim == 2 else read.transpose(2, 0, 1)
    return found


def total_variation(images: Tensor, weight: float, iterations: int = 100) -> Tensor:
    """The minimiser u of ‖u - f‖²/2 + weight·TV(u) for each channel f of float images N×C×H×W; of that shape.

    Chambolle's projection (*An Algorithm for Total Variation Minimization and Applications*, 2004, eq. 9): the dual
    field p ← (p + τ∇(div p - f/weight)) / (1 + τ|∇(div p - f/weight)|), then u = f - weight·div p. TV is isotropic.
    """
    if not weight > 0:
        raise InputError(f"The weight of total variation must be above 0, not {weight!r}.")
    down, right = torch.zeros_like(images), torch.zeros_like(images)
    for _ in range(iterations):
        rows, columns = _gradient(_divergence(down, right) - images / weight)
        size = 1 + _STEP * (rows.square() + columns.square()).sqrt()
        down, right = (down + _STEP * rows) / size, (right + _STEP * columns) / size
    return images - weight * _divergence(down, right)


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


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences, zero at the far edges."""
    rows, columns = torch.zeros_like(images), torch.zeros_like(images)
    rows[..., :-1, :] = images[..., 1:, :] - images[..., :-1, :]
    columns[..., :-1] = images[..., 1:] - images[..., :-1]
    return rows, columns


def _divergence(down: Tensor, right: Tensor) -> Tensor:
    """Minus the adjoint of :func:`_gradient`."""
    found = torch.zeros_like(down)
    found[..., :-1, :] += down[..., :-1, :]
    found[..., 1:, :] -= down[..., :-1, :]
    found[..., :-1] += right[..., :-1]
    found[..., 1:] -= right[..., :-1]
    return found
