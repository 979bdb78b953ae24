"""The formats that a package can hold: what each is called, where it lies, what runs it, how closely it must answer.

No heavy imports: a device reads this. Limits are as in :mod:`exporters.parity`, on the logits of the same images.

>>> FORMATS["onnx-fp32"].title, FORMATS["onnx-fp32"].path
('ONNX fp32', 'model.onnx')
>>> named_formats(["onnx-fp23"])
Traceback (most recent call last):
keys.errors.InputError: There is no format 'onnx-fp23'; choose among onnx-fp32, onnx-fp16, onnx-int8, \
onnx-int8-static, ort-fp32, coreml-fp32, coreml-fp16, coreml-int8, coreml-palettized.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from exporters.parity import (
    COREML_FP16,
    COREML_FP32,
    COREML_INT8,
    COREML_PALETTIZED,
    ONNX_FP16,
    ONNX_FP32,
    ONNX_INT8,
    ParityLimits,
)
from keys.errors import InputError


@dataclass(frozen=True)
class Format:
    """One exported form of a model. ``path``: file or folder in the package; ``limits``: for parity with torch."""

    name: str
    title: str
    path: str
    runtime: Literal["onnxruntime", "coreml"]
    precision: str
    limits: ParityLimits

    @property
    def patched(self) -> bool:
        """Whether it can be written from a template: its bytes follow from each weight by itself."""
        return self.name not in ("onnx-int8-static", "ort-fp32", "coreml-palettized")

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in 8 bits or fewer: such a format is judged under attack by itself."""
        return self.precision.startswith(("int8", "palettized"))


_ALL = (
    Format("onnx-fp32", "ONNX fp32", "model.onnx", "onnxruntime", "fp32", ONNX_FP32),
    Format("onnx-fp16", "ONNX fp16", "model-fp16.onnx", "onnxruntime", "fp16", ONNX_FP16),
    Format("onnx-int8", "ONNX int8", "model-int8.onnx", "onnxruntime", "int8", ONNX_INT8),
    Format("onnx-int8-static", "ONNX int8 static", "model-int8-static.onnx", "onnxruntime", "int8-static", ONNX_INT8),
    Format("ort-fp32", "ORT fp32", "model.ort", "onnxruntime", "fp32", ONNX_FP32),
    Format("coreml-fp32", "Core ML fp32", "model-fp32.mlpackage", "coreml", "fp32", COREML_FP32),
    Format("coreml-fp16", "Core ML fp16", "model.mlpackage", "coreml", "fp16", COREML_FP16),
    Format("coreml-int8", "Core ML int8", "model-int8.mlpackage", "coreml", "int8", COREML_INT8),
    Format(
        "coreml-palettized", "Core ML palettized", "model-palettized.mlpackage", "coreml", "palettized",
        COREML_PALETTIZED,
    ),
)  # fmt: skip
FORMATS = {format.name: format for format in _ALL}
OPSETS, OPSET = range(17, 23), 20  # of ONNX
DEFAULT_FORMATS = ("onnx-fp32", "coreml-fp16", "coreml-fp32")


def named_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """The formats of these names, in this order. Raises :class:`InputError` for an unknown or repeated name."""
    chosen = list(names)
    for name in chosen:
        if name not in FORMATS:
            raise InputError(f"There is no format {name!r}; choose among {', '.join(FORMATS)}.")
        if chosen.count(name) > 1:
            raise InputError(f"The format {name} is named twice; name each once.")
    return tuple(FORMATS[name] for name in chosen)
