"""An ONNX model in onnxruntime's own format (``.ort``): a flat buffer that mobile and minimal builds load.

onnxruntime itself writes it, at the optimisation level *basic*: constants are folded and operators that do nothing
are removed, and only operators of the ONNX standard are left. The higher levels are left out on purpose: *extended*
brings in onnxruntime's own operators, which a build made for standard models may lack, and *all* lays weights out
for the processor of the machine that exports, not of the device that runs. The same model gives the same bytes with
the same onnxruntime (see :mod:`exporters.ort_order`). Class names and input contract stay inside.

Weights may be folded into others here, so files of two devices may differ in more than their weights' values.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime

from exporters.ort_order import in_order
from exporters.run_onnx import LOAD_ERRORS
from keys.errors import InputError, StorageError
from keys.files import storage_errors, write_atomic


def export_ort(onnx_bytes: bytes, path: Path) -> None:
    """Write the ONNX model ``onnx_bytes`` to ``path`` in onnxruntime's format, whole or not at all.

    Raises :class:`InputError` if onnxruntime cannot load the model, and ``StorageError`` if the disk is full.
    """
    path = Path(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    # onnxruntime writes to a path alone; the private folder lies on the disk where the file stays.
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as folder:
            written = Path(folder) / "model.ort"
            options.optimized_model_filepath = str(written)
            try:
                onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
            except LOAD_ERRORS as error:
                # The file is begun only when the model is loaded and optimised: what fails then is the disk.
                if written.exists():
                    raise StorageError(
                        f"{path} could not be written by onnxruntime; free space and run again."
                    ) from error
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(f"onnxruntime cannot write this model in its own format: {reason}") from error
            write_atomic(path, in_order(written.read_bytes()))
