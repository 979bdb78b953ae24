"""LGS: suppress what lies in windows of high image gradient (Naseer, Khan and Porikli, WACV 2019).

The magnitude of the first-order gradient is brought to [0, 1] for each image; windows whose mean reaches the threshold
keep it, all others are set to 0; the image is scaled by 1 − λ·g, cut at 0.

The paper's parameters, for ImageNet at 299 pixels, are λ = 2.3, threshold 0.1, windows of 15 with an overlap of 5. For
images of 28 to 64 pixels the windows here are 5 with an overlap of 2: about the same third of a window, and about the
same share of a patch (15 of the 42 to 80 pixels of the paper's patches, 5 of the 7 to 16 pixels of a 5 % to 25 % patch
at 32). λ and the threshold are the paper's.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from device_tests.defences.differences import forward_differences, lengths
from keys.errors import InputError


class LocalGradientSmoothing(nn.Module):
    """Images float N×C×H×W in [0, 1] → the same; differentiable almost everywhere, deterministic.

    ``factor``: λ ≥ 0, where 0 is no defence. ``threshold``: least mean of a window that is acted on, in [0, 1].
    ``window``: its side in pixels. ``overlap``: of neighbouring windows, in pixels, below ``window``. The gradient of
    a colour image is the mean of its channels'. Raises :class:`InputError` for anything else.
    """

    def __init__(self, factor: float = 2.3, threshold: float = 0.1, window: int = 5, overlap: int = 2) -> None:
        super().__init__()
        if not (factor >= 0 and 0 <= threshold <= 1 and 0 <= overlap < window):
            raise InputError(
                f"LGS takes a factor of at least 0, a threshold in [0, 1] and an overlap below its window, not "
                f"{factor}, {threshold}, {overlap} and {window}."
            )
        self.factor, self.threshold, self.window, self.overlap = factor, threshold, window, overlap

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images with the regions of high gradient darkened."""
        return images * (1 - (self.factor * self.suppressed(images)).clamp(max=1))

    def suppressed(self, images: torch.Tensor) -> torch.Tensor:
        """The normalised gradient, 0 outside the windows that reach the threshold: N×1×H×W in [0, 1]."""
        magnitude = lengths(*forward_differences(images)).mean(dim=1, keepdim=True)
        low, high = magnitude.amin(dim=(2, 3), keepdim=True), magnitude.amax(dim=(2, 3), keepdim=True)
        spread = high - low
        # An image of one colour has no gradient to normalise.
        normalised = torch.where(spread > 0, (magnitude - low) / torch.where(spread > 0, spread, 1.0), 0.0)
        return normalised * self._active(normalised.detach())

    def _active(self, gradient: torch.Tensor) -> torch.Tensor:
        """1 where some window over a pixel reaches the threshold, else 0: N×1×H×W."""
        height, width = gradient.shape[-2:]
        stride = self.window - self.overlap
        below, right = (self._missing(side, stride) for side in (height, width))
        padded = functional.pad(gradient, (0, right, 0, below))
        real = functional.pad(torch.ones_like(gradient), (0, right, 0, below))
        # A window that reaches over the edge is judged by the pixels that it has.
        mean = functional.avg_pool2d(padded, self.window, stride) / functional.avg_pool2d(real, self.window, stride)
        reached = (mean >= self.threshold).to(gradient)
        ones = gradient.new_ones(1, 1, self.window, self.window)
        covered = functional.conv_transpose2d(reached, ones, stride=stride)
        return (covered[:, :, :height, :width] > 0.5).to(gradient)

    def _missing(self, side: int, stride: int) -> int:
        return -(side - self.window) % stride if side > self.window else self.window - side

    def extra_repr(self) -> str:
        """The parameters: they are the whole defence."""
        return f"factor={self.factor}, threshold={self.threshold}, window={self.window}, overlap={self.overlap}"
