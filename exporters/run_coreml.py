"""Core ML packages as runtimes: evaluated in NumPy anywhere, or predicted by Core ML itself on macOS.

Both take what every runtime takes, floats in [0, 1], and hand the model what a device hands it: one 8-bit image
of the contract's size. Both read the package's output ``logits``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.contract import checked_images
from exporters.measured import NotMeasured
from exporters.quiet import import_coremltools, quiet
from exporters.runtime import Runtime
from keys.errors import InputError


class CoreMLEvaluator:
    """A Core ML package evaluated in NumPy (see :mod:`exporters.mil.evaluator` for the numerical model).

    ``package`` is the folder, or the bytes of its files by their path inside it. Raises :class:`InputError` if it is
    damaged, is not as :mod:`exporters.to_coreml` writes it, or uses an operator that the evaluator does not know,
    which it names.
    """

    name = "coreml-evaluator"

    def __init__(self, package: Path | Mapping[str, bytes]) -> None:
        # Here, because a device that predicts with Core ML needs none of it.
        from exporters.mil.evaluator import Evaluator
        from exporters.mil.program import read_program

        program = read_program(package if isinstance(package, Mapping) else Path(package))
        shapes = [tensor.shape for tensor in program.inputs.values()]
        if list(program.inputs) != ["image"] or len(shapes[0]) != 4 or "logits" not in program.outputs:
            raise InputError(
                f"Expected {program.label} to map an 'image' 1×C×H×W to 'logits'; found inputs {list(program.inputs)} "
                f"and outputs {list(program.outputs)}."
            )
        self.precision = program.precision
        self.input_shape: tuple[int, int, int] = (shapes[0][1], shapes[0][2], shapes[0][3])
        self._evaluator = Evaluator(program)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1], rounded to 8 bits first."""
        return self._outputs(images)["logits"][:, 0].astype(np.float32)

    def classes(self, images: np.ndarray) -> list[str]:
        """The class name that the package answers for each image, as an app gets it."""
        return [str(label) for label in self._outputs(images)["classLabel"]]

    def first_overflow(self, images: np.ndarray) -> str | None:
        """The first variable that is not finite for these images, in words; ``None`` if all are finite.

        What to say where logits are not finite: see :meth:`exporters.mil.evaluator.Evaluator.first_overflow`.
        """
        return self._evaluator.first_overflow(self._inputs(images))

    def _inputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": eight_bit(images, self.input_shape).astype(np.float32)[:, np.newaxis]}

    def _outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._evaluator.run(self._inputs(images))


def predict_unavailable() -> NotMeasured | None:
    """Why :class:`CoreMLPredict` cannot run on this system, for the report; ``None`` where it can."""
    if sys.platform == "darwin":
        return None
    return NotMeasured(f"Core ML predicts on macOS only and this system is {sys.platform}")


class CoreMLPredict:
    """A ``.mlpackage`` predicted by Core ML, image by image; macOS 13 or newer, with coremltools and Pillow.

    Raises :class:`InputError` on any other system (its figures are then not measured) or if Core ML cannot
    load the package.
    """

    name = "coreml-predict"

    def __init__(self, path: Path) -> None:
        reason = predict_unavailable()
        if reason is not None:
            raise InputError(f"Not measured: {reason.reason}; run this on a Mac.")
        ct = import_coremltools()
        try:
            with quiet():
                self._model: Any = ct.models.MLModel(str(path))
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"Core ML cannot load {path}: {error}") from error
        image = next(iter(self._model.get_spec().description.input)).type.imageType
        channels = 1 if image.colorSpace == image.GRAYSCALE else 3
        self.input_shape: tuple[int, int, int] = (channels, image.height, image.width)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1], rounded to 8 bits first."""
        # Here, because only predictions need Pillow: Core ML takes its images.
        from PIL import Image

        rows = []
        for levels in eight_bit(images, self.input_shape):
            picture = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
            rows.append(np.asarray(self._model.predict({"image": picture})["logits"]).reshape(-1))
        return np.stack(rows).astype(np.float32)


def best_coreml_runtime(path: Path) -> Runtime:
    """Core ML itself on macOS, the evaluator elsewhere; its ``name`` says which in every report."""
    return CoreMLEvaluator(path) if predict_unavailable() else CoreMLPredict(path)


def eight_bit(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """``images`` float32 N×C×H×W in [0, 1] as uint8 levels, to the nearest: exact for 8-bit values / 255.

    Raises :class:`InputError` for other shapes or values.
    """
    return np.rint(checked_images(images, shape) * 255).astype(np.uint8)
