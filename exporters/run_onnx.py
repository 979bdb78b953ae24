"""ONNX models, and those in onnxruntime's own format, on the CPU.

It imports NumPy and onnxruntime only, because devices load it.
A model is taken as :mod:`exporters.to_onnx` and :mod:`exporters.to_ort` write it: one float32 input ``image`` N×C×H×W
in [0, 1], N free or fixed, one output ``logits`` N×K. Where N is fixed to 1, images are run one by one.

From bytes, nothing touches the disk: onnxruntime parses the graph without the weights, and is handed the weights as
views of these bytes. It copies what it keeps while the session is made, so the bytes need not outlive that; parsing
the whole file as one message would hold the weights once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

# A compiled module without stubs; onnxruntime's exceptions are named nowhere else.
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]

from exporters.contract import checked_images
from exporters.onnx_file import split
from exporters.runtime import BATCH, batches
from keys.errors import InputError

LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.ModelLoadCanceled,
    ort_errors.ModelRequiresCompilation,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    OSError,
)


# The identifier of onnxruntime's own format, a flatbuffer, at byte 4; onnxruntime alone can read it.
_ORT_IDENTIFIER = b"ORTM"


class OnnxRuntime:
    """An ONNX or ORT model ready to run.

    ``source`` is a path or the model's bytes (verified bytes need not touch the disk again); ``threads``
    is the number of compute threads, onnxruntime's own choice if ``None``; ``session`` is onnxruntime's.
    Raises :class:`InputError` if the model cannot be loaded, has other inputs and outputs, or is given as bytes and
    keeps weights in another file.
    """

    name = "onnxruntime"

    def __init__(self, source: str | Path | bytes, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        where = "the ONNX model" if isinstance(source, bytes) else f"the ONNX model {source}"
        try:
            model = _from_memory(source, options) if isinstance(source, bytes) else str(source)
            self.session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except (*LOAD_ERRORS, InputError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"onnxruntime cannot load {where}: {reason}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        found = ([value.name for value in inputs], [value.name for value in outputs])
        shape = inputs[0].shape if inputs else []
        sides = tuple(side for side in shape[1:] if isinstance(side, int))
        if found != (["image"], ["logits"]) or inputs[0].type != "tensor(float)" or len(sides) != 3:
            raise InputError(
                f"Expected {where} to map float32 'image' N×C×H×W to 'logits'; "
                f"found inputs {found[0]} of shape {shape} and outputs {found[1]}."
            )
        self.input_shape: tuple[int, int, int] = (sides[0], sides[1], sides[2])
        self._batch = BATCH
        if isinstance(shape[0], int):
            if shape[0] != 1:
                raise InputError(
                    f"Expected {where} to take any number of images or one; it takes {shape[0]} at a time."
                )
            self._batch = 1

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1]. Raises :class:`InputError` for others."""
        images = checked_images(images, self.input_shape)
        parts = [self.session.run(["logits"], {"image": part})[0] for part in batches(images, self._batch)]
        return np.concatenate([np.asarray(part) for part in parts])


def _from_memory(data: bytes, options: Any) -> bytes:
    """What a session is made of for a model given as bytes; ``options`` get the weights, where they can be split off.

    The values in the options are views of ``data``, which therefore must live until the session is made. (Not
    ``add_initializer``: what it is given must live as long as the session.)
    """
    if data[4:8] == _ORT_IDENTIFIER:
        # No copy of the whole file while it is read; onnxruntime's Python session holds on to these bytes.
        options.add_session_config_entry("session.use_ort_model_bytes_directly", "1")
        return data
    graph, weights = split(data)
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    return graph
