"""One interface for everything that turns images into logits; one file per implementation.

``run_torch.TorchRuntime``, ``run_onnx.OnnxRuntime``, ``run_coreml.CoreMLEvaluator`` and
``run_coreml.CoreMLPredict`` satisfy it. The judge and the device's validator know only this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

BATCH = 64


class Runtime(Protocol):
    """Images in, logits out."""

    @property
    def name(self) -> str:
        """What a report calls it: ``torch``, ``onnxruntime``, ``coreml-evaluator`` or ``coreml-predict``."""
        ...

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1], N ≥ 1; batches inside."""
        ...


def batches(images: np.ndarray, size: int = BATCH) -> Iterator[np.ndarray]:
    """``images`` in order, ``size`` at a time.

    >>> [len(part) for part in batches(np.zeros((5, 1, 2, 2)), 2)]
    [2, 2, 1]
    """
    for start in range(0, len(images), size):
        yield images[start : start + size]
