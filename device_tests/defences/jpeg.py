"""JPEG compression as a defence (Dziugaite et al. 2016; Das et al. 2017), with BPDA's gradient.

Forward is Pillow's own encoder and decoder on 8-bit images, backward the identity: the attacker's gradient passes as if
nothing had been compressed, which is how this defence is attacked (Athalye et al., ICML 2018).
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from device_tests.attacks.bpda import StandInGradient
from device_tests.images import LEVELS
from keys.errors import InputError


class JpegCompression(StandInGradient):
    """Images float N×C×H×W in [0, 1], C = 1 or 3 → the same after JPEG of ``quality`` 1 to 95.

    75 is the usual value of the literature. Raises :class:`InputError` for another quality or number of channels.
    """

    def __init__(self, quality: int = 75) -> None:
        if not 1 <= quality <= 95:
            raise InputError(f"JPEG's quality is 1 to 95, not {quality}; 75 is usual.")
        super().__init__(_Codec(quality))


class _Codec(nn.Module):
    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] not in (1, 3):
            raise InputError(f"JPEG takes grey or RGB images, not {images.shape[1]} channels.")
        levels = torch.round(images.detach().clamp(0, 1) * LEVELS).to(torch.uint8).cpu().numpy()
        decoded = np.stack([self._through(image) for image in levels])
        return torch.from_numpy(decoded).to(images) / LEVELS

    def _through(self, image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
            file, "JPEG", quality=self.quality
        )
        pixels = np.asarray(Image.open(file))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def extra_repr(self) -> str:
        return f"quality={self.quality}"
