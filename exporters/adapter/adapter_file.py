"""``adapter.onnx_adapter``: the tensors of one device, in the format that onnxruntime loads as LoRA by itself.

A pair ``X.lora_A`` (r, in) and ``X.lora_B`` (out, r) is a low-rank update of the base's ``X.weight``, with the scaling
in B; every other name is a tensor of the base's graph that is replaced as a whole. Devices read this: numpy and
onnxruntime only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.low_rank import merged
from exporters.manifest import shown
from keys.errors import InputError, PackageError

ADAPTER_NAME = "adapter.onnx_adapter"
A, B, WEIGHT = ".lora_A", ".lora_B", ".weight"
_VERSION = 1


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 and int64 ``tensors`` by name to ``path``; the same tensors give the same bytes.

    Raises :class:`InputError` for a value that is not finite.
    """
    # onnxruntime's values point into these arrays, which have to live until the file is written; in order of the
    # names, because onnxruntime writes in an order that depends on the order it was given.
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"The tensor {name} holds NaN or infinite values; train the model again.")
    content: Any = onnxruntime.AdapterFormat()  # annotated as taking a path object, takes text
    content.set_adapter_version(_VERSION)
    content.set_model_version(_VERSION)
    content.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()})
    content.export_adapter(str(path))


def read_adapter(data: bytes) -> dict[str, np.ndarray]:
    """The tensors in the bytes of an adapter file, float32 or int64, all finite.

    Raises :class:`PackageError` if the bytes are damaged or hold other values.
    """
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as scratch:
        path = Path(scratch) / ADAPTER_NAME
        path.write_bytes(data)
        return read_adapter_file(path)


def read_adapter_file(path: Path) -> dict[str, np.ndarray]:
    """As :func:`read_adapter`, for a file that nobody else can change."""
    reader: Any = onnxruntime.AdapterFormat
    try:
        values = reader.read_adapter(str(path)).get_parameters()
        # Copied, because the values point into the mapped file.
        tensors = {name: np.array(value.numpy()) for name, value in sorted(values.items())}
    except Exception as error:  # onnxruntime raises bare RuntimeErrors of its own here
        raise PackageError(
            f"{ADAPTER_NAME} is damaged: onnxruntime cannot read it; get the adapter package again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype.name not in ("float32", "int64"):
            raise PackageError(f"{ADAPTER_NAME} holds {shown(name)} as {tensor.dtype}; get the adapter package again.")
        if not np.isfinite(tensor).all():
            raise PackageError(
                f"{ADAPTER_NAME} holds NaN or infinite values in {shown(name)}; get the adapter package again."
            )
    return tensors


def device_tensors(base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The device model's own value of every tensor in which it differs from the base; pairs are merged.

    ``base``: the base's float32 tensors by name. Raises :class:`PackageError` if a pair is incomplete or of another
    shape than the base's weight.
    """
    values = {name: tensor for name, tensor in adapter.items() if not name.endswith((A, B))}
    pairs = {name.removesuffix(A).removesuffix(B) for name in adapter.keys() - values.keys()}
    for layer in sorted(pairs):
        a, b, weight = adapter.get(layer + A), adapter.get(layer + B), base.get(layer + WEIGHT)
        if a is None or b is None or weight is None:
            raise PackageError(f"The adapter's update of {shown(layer)} is incomplete; get the adapter package again.")
        if a.ndim != 2 or b.ndim != 2 or weight.shape != (len(b), a.shape[1]) or b.shape[1] != len(a):
            raise PackageError(
                f"The adapter's update of {shown(layer)}, {b.shape} times {a.shape}, does not fit the base's weight "
                f"of {weight.shape}; get the adapter package of this fleet."
            )
        values[layer + WEIGHT] = merged(weight, a, b)
    return values
