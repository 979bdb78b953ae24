"""Between 8-bit images and the float images of a model: N×C×H×W, uint8 0 … 255 or float32 in [0, 1].

Rule: a device only ever receives 8-bit values, so whatever is judged is an 8-bit image divided by 255. NumPy only.

>>> from_8bit(np.array([0, 255], dtype=np.uint8))
array([0., 1.], dtype=float32)
"""

from __future__ import annotations

import numpy as np

from keys.errors import InputError

LEVELS = 255
"""The largest 8-bit value."""


def from_8bit(images: np.ndarray) -> np.ndarray:
    """Turn uint8 levels into float32 in [0, 1]: level / 255, what every runtime is given."""
    if images.dtype != np.uint8:
        raise InputError(f"Images to judge must be 8-bit (uint8), not {images.dtype}; round them first.")
    return images.astype(np.float32) / LEVELS
