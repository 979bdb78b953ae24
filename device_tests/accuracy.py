"""Clean accuracy of anything that gives logits, and its drop against the base. No torch: devices use it.

Rules: images are 8-bit; an image whose logits are not all finite has no prediction and counts as wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from device_tests.evidence import Proportion
from device_tests.images import from_8bit
from exporters.runtime import Runtime
from keys.errors import InputError

NO_PREDICTION = -1
"""Stands for a prediction where a logit is not finite; equal to no label."""

CHUNK = 256
"""Images handed to a runtime at once, so that a large test set is never in memory as floats."""


def logits_of(runtime: Runtime, images: np.ndarray) -> np.ndarray:
    """Return the logits, float N×K, of uint8 images N×C×H×W. Raises :class:`InputError` if there are no images."""
    return np.concatenate(list(_in_chunks(runtime, images)))


def top_class(logits: np.ndarray) -> np.ndarray:
    """Return the class of the largest logit, int64, for logits …×K; ``NO_PREDICTION`` where one is not finite."""
    return np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), NO_PREDICTION).astype(np.int64)


def predict(runtime: Runtime, images: np.ndarray) -> np.ndarray:
    """Return the class of the largest logit for each uint8 image N×C×H×W, int64 N.

    It is ``NO_PREDICTION`` where a logit is NaN or infinite.
    Raises :class:`InputError` if there are no images.
    """
    return np.concatenate([top_class(logits) for logits in _in_chunks(runtime, images)])


def _in_chunks(runtime: Runtime, images: np.ndarray) -> Iterator[np.ndarray]:
    if len(images) == 0:
        raise InputError("There are no images to judge; give a test set with at least one image.")
    for start in range(0, len(images), CHUNK):
        yield runtime.logits(from_8bit(images[start : start + CHUNK]))


def accuracy(runtime: Runtime, images: np.ndarray, labels: np.ndarray) -> Proportion:
    """Clean accuracy on uint8 images N×C×H×W with integer labels N."""
    if len(labels) != len(images):
        raise InputError(f"{len(images)} images came with {len(labels)} labels; give one label per image.")
    return Proportion(int((predict(runtime, images) == labels).sum()), len(images))


def accuracy_drop(base: Proportion, device: Proportion) -> float:
    """Base minus device accuracy, as a share; both must come from the same images.

    Raises ``ValueError`` if their n differ: they were then not measured on the same images.
    """
    if base.n != device.n:
        raise ValueError(f"accuracies on {base.n} and {device.n} images cannot be compared")
    return (base.successes - device.successes) / base.n
