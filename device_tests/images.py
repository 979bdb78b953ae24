"""Between 8-bit images and the float images of a model: N×C×H×W, uint8 0 … 255 or float32 in [0, 1].

Rules: a device only ever receives 8-bit values, so whatever is judged is an 8-bit image divided by 255. An
L∞ radius ε reaches floor(ε·255) whole levels; rounding goes inward, never out of the ball. NumPy only.

>>> reachable_levels(8 / 255), reachable_levels(0.06)
(8, 15)
"""

from __future__ import annotations

import math

import numpy as np

from keys.errors import InputError

LEVELS = 255


def from_8bit(images: np.ndarray) -> np.ndarray:
    """Turn uint8 levels into float32 in [0, 1]: level / 255, what every runtime is given."""
    if images.dtype != np.uint8:
        raise InputError(f"Images to judge must be 8-bit (uint8), not {images.dtype}; round them first.")
    return images.astype(np.float32) / LEVELS


def reachable_levels(epsilon: float) -> int:
    """How many whole 8-bit levels the L∞ radius ``epsilon`` (on [0, 1]) reaches.

    Raises :class:`InputError` if it reaches none or lies above 1.
    """
    # 1e-6 levels of slack: 8/255 must reach 8 levels even where 8/255·255 comes out as 7.999….
    if not (math.isfinite(epsilon) and epsilon <= 1 and epsilon * LEVELS + 1e-6 >= 1):
        raise InputError(
            f"The radius ε = {epsilon} must lie between 1/255 and 1, because images are judged in 8 bits; "
            "8/255 is usual."
        )
    return math.floor(epsilon * LEVELS + 1e-6)


def to_8bit(images: np.ndarray, clean: np.ndarray, epsilon: float) -> np.ndarray:
    """Round float images in [0, 1] to uint8 levels that stay within ``epsilon`` of the 8-bit ``clean`` images.

    Where ε·255 is an integer, rounding to the nearest level cannot leave the ball; elsewhere a level outside is
    moved to the last one inside, so that |adversarial − clean| ≤ floor(ε·255) levels ≤ ε always. A candidate
    outside the ball is brought back in the same way: no attack can win by leaving it.
    Raises :class:`InputError` for values that are not finite, and ``ValueError`` if the shapes differ.
    """
    if images.shape != clean.shape or clean.dtype != np.uint8:
        raise ValueError(f"expected uint8 clean images of shape {images.shape}, got {clean.dtype} {clean.shape}")
    if not np.isfinite(images).all():
        raise InputError(
            "An attack returned values that are not finite; train its source model again or use another attack."
        )
    levels = reachable_levels(epsilon)
    nearest = np.rint(images.astype(np.float64) * LEVELS)
    low = np.maximum(clean.astype(np.int16) - levels, 0)
    high = np.minimum(clean.astype(np.int16) + levels, LEVELS)
    return np.clip(nearest, low, high).astype(np.uint8)
