"""The input contract: what a caller feeds a model, one for every format; no heavy imports (devices read it).

A plain module and the ONNX model take float32 N×C×H×W in [0, 1]; Core ML takes one 8-bit image of the same
size. Normalisation and shuffle are inside the graph, so nothing else has to be known to use a model.

>>> contract = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
>>> contract.color, contract.shape
('grey', (1, 28, 28))
>>> InputContract.from_json(contract.to_json()) == contract
True
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from keys.errors import InputError

LARGEST_SIDE = 16_384


@dataclass(frozen=True)
class InputContract:
    """Channels (1 = grey, 3 = RGB), height and width in pixels, and the resize that evaluation used.

    Raises :class:`InputError` for values outside these.
    """

    channels: int
    height: int
    width: int
    resize: str

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise InputError(f"An input has 1 channel (grey) or 3 (RGB), not {self.channels!r}.")
        for name, side in (("height", self.height), ("width", self.width)):
            if type(side) is not int or not 1 <= side <= LARGEST_SIDE:
                raise InputError(f"The input {name} must be between 1 and {LARGEST_SIDE} pixels, not {side!r}.")
        if type(self.resize) is not str or not self.resize.strip():
            raise InputError("The input contract must name the resize that evaluation used; it is empty.")

    @property
    def color(self) -> str:
        """``"grey"`` or ``"rgb"``."""
        return "grey" if self.channels == 1 else "rgb"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.channels, self.height, self.width)

    def to_json(self) -> dict[str, object]:
        """The contract as a JSON object with exactly its four fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> InputContract:
        """Read what :meth:`to_json` gave. Raises :class:`InputError` for a missing, unknown or wrong field."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"An input contract has exactly the fields {', '.join(names)}; found {found}.")
        return cls(**value)


def checked_images(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """``images`` as contiguous float32 N×C×H×W with values in [0, 1].

    Raises :class:`InputError` if the shape is not N×``shape``, N is 0, if the values are not floats (8-bit images
    are divided by 255 first), or if one of them is outside [0, 1] or not a number.
    """
    if images.ndim != 4 or images.shape[1:] != shape:
        wanted = "×".join(map(str, shape))
        raise InputError(f"The model takes images N×{wanted}; got an array of shape {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"Images must be floats in [0, 1]; got {images.dtype}: divide 8-bit images by 255.")
    if not len(images):
        raise InputError("There are no images to run the model on; give at least one.")
    images = np.ascontiguousarray(images, dtype=np.float32)
    # Written so that a NaN fails it as well.
    if not (images.min() >= 0.0 and images.max() <= 1.0):
        raise InputError(f"Image values must lie in [0, 1]; got values from {images.min():g} to {images.max():g}.")
    return images
