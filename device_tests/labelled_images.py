"""Labelled images on a device: one .npz file of 8-bit arrays, as a device has numpy and no image decoder.

Rules of this module: nothing is resized or converted, so that an accuracy is measured on exactly what the
caller gave; a file that does not fit the model is refused with what would fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.contract import InputContract
from exporters.golden import read_arrays
from keys.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """``images`` uint8 (N, C, H, W); ``labels`` int64 (N,) from 0; N ≥ 1."""

    images: np.ndarray
    labels: np.ndarray


def read_labelled_images(path: Path, contract: InputContract, classes: int) -> LabelledImages:
    """Read ``images`` (uint8 N,C,H,W, or N,H,W,C, or for grey N,H,W) and ``labels`` (integers) from an .npz.

    Raises :class:`InputError` if the file cannot be read or does not fit a model of this contract with
    ``classes`` classes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"The data file {path} cannot be read ({error.strerror}); give an .npz.") from error
    arrays = read_arrays(data, ("images", "labels"), str(path))
    images = _images(arrays["images"], contract, path)
    labels = arrays["labels"]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise InputError(
            f"{path} holds labels of {labels.dtype} and shape {labels.shape}, which are not one class number "
            "per image; give one integer for each."
        )
    if len(labels) != len(images):
        raise InputError(f"{path} holds {len(images)} images and {len(labels)} labels; give one for each.")
    if len(images) == 0:
        raise InputError(f"{path} holds no images; give at least one.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"{path} holds labels from {low} to {high}, but the package's {classes} classes are numbered "
            f"from 0 to {classes - 1}; number them in the order of the manifest's labels."
        )
    return LabelledImages(images, labels.astype(np.int64))


def _images(images: np.ndarray, contract: InputContract, path: Path) -> np.ndarray:
    channels, height, width = contract.shape
    if images.dtype != np.uint8:
        raise InputError(f"{path} holds images of {images.dtype}; give 8-bit values (uint8, 0 to 255).")
    if images.ndim == 4 and images.shape[1:] == (channels, height, width):
        return images
    if images.ndim == 4 and images.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if channels == 1 and images.ndim == 3 and images.shape[1:] == (height, width):
        return images[:, None]
    raise InputError(
        f"{path} holds images of shape {images.shape}, but the model takes {contract.color} images of shape "
        f"(N, {channels}, {height}, {width}); prepare them as in evaluation: {contract.resize}."
    )
