"""What a model file holds, for people to look at: inputs, outputs, operators, tensors, sizes; nothing is run.

The factory's side: readers may use the onnx library and coremltools. One reader per format, chosen by the path. What
is read is frozen, and says nothing of a tensor's values but what :mod:`exporters.inspect_diff` counts.

>>> model_kind(Path("package/model.mlpackage"))
'Core ML'
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from keys.errors import InputError

Kind = Literal["ONNX", "ORT", "Core ML", "ONNX adapter"]
_SUFFIXES: dict[str, Kind] = {
    ".onnx": "ONNX", ".ort": "ORT", ".mlpackage": "Core ML", ".onnx_adapter": "ONNX adapter",
}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """An input or output: ``type`` in the format's own words; a side of ``shape`` is a number, or a name if free."""

    name: str
    type: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"name": self.name, "type": self.type, "shape": list(self.shape)}


@dataclass(frozen=True)
class Node:
    """One operator in the graph; two are equal if ``wiring`` (names, attributes; no tensor's values) is."""

    type: str
    wiring: bytes


@dataclass(frozen=True, eq=False)
class Model:
    """A model as its file describes it.

    ``tensors`` are the constants by name, in the types of the file; ``versions`` names operator sets and formats;
    ``graph_bytes`` and ``weight_bytes`` are sizes on disk; ``parameters`` counts the values of weights (floating-point
    numbers and what stands for them), without indices and shapes.
    """

    path: Path
    kind: Kind
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, np.ndarray]
    versions: Mapping[str, str]
    metadata: Mapping[str, str]
    graph_bytes: int
    weight_bytes: int
    parameters: int

    @property
    def operators(self) -> dict[str, int]:
        """How often each type of operator occurs, the most frequent first."""
        return dict(sorted(Counter(node.type for node in self.nodes).items(), key=lambda item: (-item[1], item[0])))

    @property
    def precision(self) -> dict[str, int]:
        """Bytes of all tensors by type, the largest first; texts are left out."""
        sizes: Counter[str] = Counter()
        for values in self.tensors.values():
            if values.dtype.kind != "U":
                sizes[str(values.dtype)] += values.nbytes
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def batch(self) -> str:
        """How many images it takes at once: a number, ``any`` if that is free, nothing for an adapter."""
        if not self.inputs:
            return ""
        shape = self.inputs[0].shape
        if self.kind == "Core ML":
            return "1"
        return str(shape[0]) if shape and isinstance(shape[0], int) else "any"

    def to_json(self) -> dict[str, object]:
        """Plain JSON types, with every tensor's name, type and shape and nobody's values."""
        return {
            "kind": self.kind,
            "inputs": [port.to_json() for port in self.inputs],
            "outputs": [port.to_json() for port in self.outputs],
            "batch": self.batch,
            "operators": self.operators,
            "parameters": self.parameters,
            "sizes": {"graph": self.graph_bytes, "weights": self.weight_bytes},
            "precision": self.precision,
            "versions": dict(self.versions),
            "metadata": dict(self.metadata),
            "tensors": [
                {"name": name, "dtype": str(values.dtype), "shape": list(values.shape), "bytes": values.nbytes}
                for name, values in self.tensors.items()
            ],
        }


def model_kind(path: Path) -> Kind | None:
    """The format that a path's name stands for, or None."""
    return _SUFFIXES.get(path.suffix)


def read_model(path: Path) -> Model:
    """Describe ``model.onnx``, ``model.ort``, ``model.mlpackage`` or the tensors of an ``.onnx_adapter``.

    Raises :class:`InputError` if there is no such file, it is damaged, or its name says none of these formats.
    """
    kind = model_kind(path)
    if kind is None:
        raise InputError(f"{path} is no model: give a package's folder, or a path that ends in {', '.join(_SUFFIXES)}.")
    if not path.exists():
        raise InputError(f"There is no model at {path}; give the path of a model or of a package.")
    if kind == "Core ML":
        from exporters.inspect_coreml import read_coreml

        return read_coreml(path)
    if not path.is_file():  # a pipe would be waited for, and a device read without end
        raise InputError(f"{path} is not a plain file; give the path of a model's file.")
    from exporters.inspect_onnx import read_adapter, read_onnx, read_ort

    if kind == "ONNX adapter":
        return read_adapter(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the path of a model's file.") from error
    return read_onnx(path, data) if kind == "ONNX" else read_ort(path, data)


def counted_parameters(tensors: Mapping[str, np.ndarray]) -> int:
    """Values of floating-point and 8-bit tensors with at least one dimension."""
    weights = [values for values in tensors.values() if values.ndim and _is_weight(values.dtype)]
    return functools.reduce(lambda total, values: total + values.size, weights, 0)


def _is_weight(dtype: np.dtype) -> bool:
    # bfloat16, float8 and 4-bit numbers come from ml_dtypes, whose kind is "V".
    return dtype.kind in "fV" or (dtype.kind in "iu" and dtype.itemsize == 1)
