"""The exported package under attack: the same 8-bit adversarial images through torch and every exported format.

Rules: an image is one trial, so it counts as fooled if any of the attacks given fools it, and as answered differently
if any of its adversarial versions is; the formats are compared with torch on the same images; a format that could not
be run is not measured, with the reason. No torch here: the reference is a runtime as the others are.

>>> class Brightness:
...     name = "example"
...     def logits(self, images):
...         bright = images.mean(axis=(1, 2, 3))
...         return np.stack([1 - bright, bright], axis=1).astype(np.float32)
>>> clean, attacked = np.full((4, 1, 2, 2), 100, np.uint8), np.full((4, 1, 2, 2), 140, np.uint8)
>>> judged = judge_package(Brightness(), {"ONNX fp32": Brightness()}, clean, np.zeros(4), {"pgd": attacked})
>>> judged.formats["ONNX fp32"].fooled, judged.formats["ONNX fp32"].differing
(Proportion(successes=4, n=4), Proportion(successes=0, n=4))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_tests.accuracy import logits_of, top_class
from device_tests.evidence import Measured, Proportion, measured_from_json, require_fields
from exporters.measured import NotMeasured
from exporters.runtime import Runtime
from keys.errors import InputError


@dataclass(frozen=True)
class FormatJudgement:
    """One exported format beside torch, on the first ``images`` of the attacked images.

    ``fooled`` and ``torch_fooled``: fooling rate of the format and of torch on these images, each among the images
    that it gets right itself when clean. ``torch_only`` and ``format_only``: images that both get right when clean and
    that fool only the one or the other. ``differing``: share of all these images of which an adversarial version has
    another top-1 class than in torch. ``largest_difference``: the largest difference of an adversarial image's logit,
    as a share of torch's largest; infinite if one of the format's is not finite.
    """

    runtime: str
    images: int
    fooled: Measured
    torch_fooled: Measured
    torch_only: int
    format_only: int
    differing: Proportion
    largest_difference: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite difference, which JSON cannot hold, is ``null``."""
        finite = math.isfinite(self.largest_difference)
        return {
            "runtime": self.runtime,
            "images": self.images,
            "fooled": self.fooled.to_json(),
            "torch_fooled": self.torch_fooled.to_json(),
            "torch_only": self.torch_only,
            "format_only": self.format_only,
            "differing": self.differing.to_json(),
            "largest_difference": self.largest_difference if finite else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FormatJudgement:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, *cls.__dataclass_fields__)
        difference = value["largest_difference"]
        return cls(
            runtime=str(value["runtime"]),
            images=int(value["images"]),
            fooled=measured_from_json(value["fooled"]),
            torch_fooled=measured_from_json(value["torch_fooled"]),
            torch_only=int(value["torch_only"]),
            format_only=int(value["format_only"]),
            differing=Proportion.from_json(value["differing"]),
            largest_difference=math.inf if difference is None else float(difference),
        )


@dataclass(frozen=True)
class PackageJudgement:
    """Every format of one package beside torch. ``attacks`` names what the adversarial images were made by."""

    attacks: tuple[str, ...]
    formats: Mapping[str, FormatJudgement | NotMeasured]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        formats = {name: judged.to_json() for name, judged in self.formats.items()}
        return {"attacks": list(self.attacks), "formats": formats}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PackageJudgement:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, "attacks", "formats")
        formats = {
            str(name): NotMeasured.from_json(judged) if "not_measured" in judged else FormatJudgement.from_json(judged)
            for name, judged in value["formats"].items()
        }
        return cls(tuple(str(attack) for attack in value["attacks"]), formats)


def judge_package(
    torch_runtime: Runtime,
    formats: Mapping[str, Runtime | NotMeasured],
    clean: np.ndarray,
    labels: np.ndarray,
    adversarial: Mapping[str, np.ndarray],
    *,
    first: Mapping[str, int] | None = None,
) -> PackageJudgement:
    """Put the same images through torch and every format of a package.

    ``clean``: uint8 N×C×H×W; ``labels``: integers N; ``adversarial``: attack → uint8 images of the same shape and
    order. ``first``: format → how many of the images it sees at most (the Core ML evaluator is slow); 0 leaves it
    unmeasured. A runtime that cannot run a model (:class:`InputError`) is not measured.
    Raises ``ValueError`` if there is no image or no attack, or if shapes differ.
    """
    if not len(clean) or not adversarial or len(labels) != len(clean):
        raise ValueError(f"nothing to judge: {len(clean)} images, {len(labels)} labels, {len(adversarial)} attacks")
    for attack, images in adversarial.items():
        if images.shape != clean.shape:
            raise ValueError(f"{attack} has images {images.shape} for {clean.shape}")
    reference = _Answers.of(torch_runtime, clean, labels, adversarial)
    judged: dict[str, FormatJudgement | NotMeasured] = {}
    for name, runtime in formats.items():
        count = min(len(clean), (first or {}).get(name, len(clean)))
        if isinstance(runtime, NotMeasured):
            judged[name] = runtime
        elif count < 1:
            judged[name] = NotMeasured("no attacked image was to go through it")
        else:
            judged[name] = _judge(reference, runtime, clean[:count], labels[:count], adversarial)
    return PackageJudgement(tuple(adversarial), judged)


@dataclass(frozen=True, eq=False)
class _Answers:
    """A runtime's logits on adversarial images, N×A×K, and what follows from them for each image."""

    logits: np.ndarray
    correct: np.ndarray
    fooled: np.ndarray

    @classmethod
    def of(
        cls, runtime: Runtime, clean: np.ndarray, labels: np.ndarray, adversarial: Mapping[str, np.ndarray]
    ) -> _Answers:
        logits = np.stack([logits_of(runtime, images[: len(clean)]) for images in adversarial.values()], axis=1)
        correct = top_class(logits_of(runtime, clean)) == labels
        return cls(logits, correct, (top_class(logits) != labels[:, None]).any(axis=1))

    def take(self, count: int) -> _Answers:
        return _Answers(self.logits[:count], self.correct[:count], self.fooled[:count])

    @property
    def rate(self) -> Measured:
        fooled = self.fooled[self.correct]
        if not len(fooled):
            return NotMeasured("none of the clean images is classified correctly")
        return Proportion(int(fooled.sum()), len(fooled))


def _judge(
    reference: _Answers, runtime: Runtime, clean: np.ndarray, labels: np.ndarray, adversarial: Mapping[str, np.ndarray]
) -> FormatJudgement | NotMeasured:
    try:
        own = _Answers.of(runtime, clean, labels, adversarial)
    except InputError as error:
        return NotMeasured(f"{runtime.name} cannot run it: {error}")
    torch = reference.take(len(clean))
    both = own.correct & torch.correct
    return FormatJudgement(
        runtime=runtime.name,
        images=len(clean),
        fooled=own.rate,
        torch_fooled=torch.rate,
        torch_only=int((both & torch.fooled & ~own.fooled).sum()),
        format_only=int((both & own.fooled & ~torch.fooled).sum()),
        differing=Proportion(int((top_class(own.logits) != top_class(torch.logits)).any(axis=1).sum()), len(clean)),
        largest_difference=_largest_difference(torch.logits, own.logits),
    )


def _largest_difference(reference: np.ndarray, measured: np.ndarray) -> float:
    """As :func:`exporters.parity.compare`: max |measured - reference| / max |reference|."""
    scale = float(np.abs(reference).max())
    if not np.isfinite(measured).all() or not (math.isfinite(scale) and scale > 0):
        return math.inf
    return float(np.abs(measured.astype(np.float64) - reference).max()) / scale
