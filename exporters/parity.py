"""Parity: whether an exported model answers as the module it was made from, with stated limits.

Two figures on the same images (8-bit values divided by 255): the largest difference of a logit as a share of
the largest reference logit, and the share of images with the same top-1 class. NumPy only: devices use it
for the golden images.

>>> reference = np.array([[4.0, 0.0], [0.0, 2.0]], np.float32)
>>> parity = compare(reference, reference + np.float32(0.002), 1e-3, 1.0, runtime="example", precision="fp32")
>>> parity.passed, round(parity.max_relative_difference, 6), parity.top1_agreement
(True, 0.0005, 1.0)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.runtime import Runtime
from keys.errors import InputError


@dataclass(frozen=True)
class ParityLimits:
    """What an export in ``precision`` may differ: ``difference`` at most, ``top1`` agreement at least."""

    precision: str
    difference: float
    top1: float


# The same float32 operations in another order: 2e-7 to 3e-6 was measured on 34 kinds of ViT, 1.5e-6 on ViT-B.
ONNX_FP32 = ParityLimits("fp32", 1e-4, 1.0)
# As above for most; coremltools scales the input of an RMS norm first, which moved a ViT with such norms by 4e-4.
COREML_FP32 = ParityLimits("fp32", 1e-3, 1.0)
# float16 keeps 11 bits: each rounding moves a value by up to 5e-4 of itself, and there are some twenty per block;
# 3e-4 to 3e-3 was measured on 34 kinds of ViT. Images whose two best logits are closer than that may change their
# class: at most 1 in 200.
COREML_FP16 = ParityLimits("fp16", 2e-2, 0.995)
# Weights rounded to float16 once, computed with in float32.
ONNX_FP16 = ParityLimits("fp16", 1e-2, 0.995)
# 8 bits keep a weight to 1/254 of the largest of its channel. What such a model may cost is said by its clean accuracy
# and by attacks on it, which are judged for each quantised format; parity only finds a broken one.
ONNX_INT8 = ParityLimits("int8", 0.15, 0.97)
COREML_INT8 = ParityLimits("int8", 0.15, 0.97)
COREML_PALETTIZED = ParityLimits("palettized", 0.15, 0.97)


@dataclass(frozen=True)
class Parity:
    """A comparison of ``n`` images' logits with the reference.

    ``max_relative_difference`` is max |measured - reference| / max |reference|, infinite if a measured logit is
    not a finite number; ``top1_agreement`` is the share of images with the same class in [0, 1].
    """

    runtime: str
    precision: str
    n: int
    max_relative_difference: float
    top1_agreement: float
    limit: float
    top1_limit: float
    passed: bool

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON; an infinite difference, which JSON cannot hold, is ``null``."""
        values = dataclasses.asdict(self)
        if not math.isfinite(self.max_relative_difference):
            values["max_relative_difference"] = None
        return values

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Parity:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for other fields or types."""
        kinds = {"runtime": str, "precision": str, "n": int, "passed": bool}
        fields = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = dict(value)
        if sorted(values) != sorted(fields):
            raise ValueError(f"not a parity value: it has the fields {sorted(values)}")
        if values["max_relative_difference"] is None:
            values["max_relative_difference"] = math.inf
        for name in fields:
            kind = kinds.get(name, float)
            if kind is float and type(values[name]) is int:
                values[name] = float(values[name])
            if type(values[name]) is not kind:
                raise ValueError(f"not a parity value: {name} is {values[name]!r}")
        return cls(**values)


def compare(
    reference: np.ndarray,
    measured: np.ndarray,
    limit: float,
    top1_limit: float,
    *,
    runtime: str,
    precision: str,
) -> Parity:
    """Compare ``measured`` logits N×K with the ``reference``; both on the same N ≥ 1 images.

    It passes if the relative difference is at most ``limit`` and the top-1 agreement at least ``top1_limit``;
    logits that are not finite never pass. Raises :class:`InputError` if the shapes differ, there is no image, or
    the reference itself is not finite or all zero.
    """
    if reference.shape != measured.shape or reference.ndim != 2 or not reference.size:
        raise InputError(f"Logits to compare must have one shape N×K; got {reference.shape} and {measured.shape}.")
    reference, measured = reference.astype(np.float64), measured.astype(np.float64)
    largest = float(np.abs(reference).max())
    if not math.isfinite(largest) or largest == 0:
        raise InputError(
            f"The reference logits cannot be compared with: the largest is {largest}; train the model again."
        )
    finite = bool(np.isfinite(measured).all())
    difference = float(np.abs(measured - reference).max()) / largest if finite else math.inf
    # A row with a NaN has no class, so it agrees with nothing.
    same = (measured.argmax(axis=1) == reference.argmax(axis=1)) & np.isfinite(measured).all(axis=1)
    agreement = float(same.mean())
    return Parity(
        runtime=runtime,
        precision=precision,
        n=len(reference),
        max_relative_difference=difference,
        top1_agreement=agreement,
        limit=limit,
        top1_limit=top1_limit,
        passed=finite and difference <= limit and agreement >= top1_limit,
    )


def measure_parity(reference: Runtime, candidate: Runtime, images: np.ndarray, limits: ParityLimits) -> Parity:
    """Run both on ``images`` (float32 N×C×H×W in [0, 1], 8-bit values / 255) and compare under ``limits``."""
    return compare(
        reference.logits(images),
        candidate.logits(images),
        limits.difference,
        limits.top1,
        runtime=candidate.name,
        precision=limits.precision,
    )
