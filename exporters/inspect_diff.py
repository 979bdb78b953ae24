"""What differs between two models, or two packages: named and counted, without the value of any tensor.

A device's key may lie in a tensor (a shuffle's order, or weights whose order follows it), and what is printed is passed
on. Hence neither values nor a digest of a single tensor are given, since a short order could be found from its digest,
and of whole numbers, which an order is made of, only how many differ.

>>> compare_tensors("w", np.float32([3, 4]), np.float32([3, 5])).to_json()["max_absolute"]
1.0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporters.inspection import Model
from exporters.manifest import FileDigest, Manifest
from keys.errors import InputError


@dataclass(frozen=True)
class Change:
    """Something named that is ``a`` on one side and ``b`` on the other; None where it is missing."""

    name: str
    a: object
    b: object


@dataclass(frozen=True)
class TensorChange:
    """Two tensors of one name. ``a`` and ``b`` are type and shape; ``differing`` of ``size`` values are not equal.

    ``max_absolute`` is the largest difference, ``max_relative`` that over the largest value in A, ``cosine`` that of
    the angle between both: None for tensors of whole numbers, of other types or shapes, or with values not finite.
    """

    name: str
    a: str
    b: str
    size: int
    differing: int | None
    max_absolute: float | None = None
    max_relative: float | None = None
    cosine: float | None = None

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class ModelDifference:
    """Two models of one format. ``operators`` are counts by type where they differ; ``rewired`` operators of the same
    types in the same order have other inputs, outputs or attributes (0 if the types differ)."""

    tensors: int
    changed: tuple[TensorChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    operators: tuple[Change, ...]
    rewired: int
    reordered: bool
    ports: tuple[Change, ...]
    versions: tuple[Change, ...]
    metadata: tuple[str, ...]

    @property
    def same_graph(self) -> bool:
        """Whether operators, their wiring, inputs, outputs and the names of the tensors are the same."""
        return not (
            self.operators or self.rewired or self.reordered or self.ports or self.only_a or self.only_b
        )  # fmt: skip

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.same_graph and not (self.changed or self.versions or self.metadata)

    @property
    def sentence(self) -> str:
        """The difference in a few words, such as ``same graph; 3 of 40 tensors differ``."""
        graph = "same graph" if self.same_graph else "the graphs differ"
        if self.equal:
            return f"{graph}; all {self.tensors} tensors are equal"
        return f"{graph}; {len(self.changed)} of {self.tensors} tensors differ"

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"equal": self.equal, "same_graph": self.same_graph, "sentence": self.sentence, **asdict(self)}


def compare_models(a: Model, b: Model) -> ModelDifference:
    """What differs between two models of one format. Raises :class:`InputError` for two formats."""
    if a.kind != b.kind:
        raise InputError(f"{a.path} is {a.kind} and {b.path} is {b.kind}; compare two models of one format.")
    common = [name for name in a.tensors if name in b.tensors]
    compared = [compare_tensors(name, a.tensors[name], b.tensors[name]) for name in common]
    types = [[node.type for node in model.nodes] for model in (a, b)]
    rewired = sum(x.wiring != y.wiring for x, y in zip(a.nodes, b.nodes, strict=True)) if types[0] == types[1] else 0
    counts = [Counter(kinds) for kinds in types]
    return ModelDifference(
        tensors=len(a.tensors.keys() | b.tensors.keys()),
        changed=tuple(change for change in compared if change.differing is None or change.differing),
        only_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_b=tuple(name for name in b.tensors if name not in a.tensors),
        operators=changes(counts[0], counts[1]),
        rewired=rewired, reordered=types[0] != types[1] and counts[0] == counts[1],
        ports=changes(_ports(a), _ports(b)), versions=changes(a.versions, b.versions),
        metadata=tuple(change.name for change in changes(a.metadata, b.metadata)),
    )  # fmt: skip


def compare_tensors(name: str, a: np.ndarray, b: np.ndarray) -> TensorChange:
    """Count and measure what differs between two tensors."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return TensorChange(name, _described(a), _described(b), max(a.size, b.size), None)
    result = TensorChange(name, _described(a), _described(b), a.size, 0)
    if a.tobytes() == b.tobytes():
        return result
    if a.dtype.kind not in "fV":
        return TensorChange(name, result.a, result.b, a.size, int(np.count_nonzero(a != b)))
    x, y = a.astype(np.float64), b.astype(np.float64)
    differing = int(np.count_nonzero((x != y) & ~(np.isnan(x) & np.isnan(y))))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return TensorChange(name, result.a, result.b, a.size, differing)
    largest, norms = np.abs(x).max(), float(np.linalg.norm(x) * np.linalg.norm(y))
    distance = float(np.abs(x - y).max())
    return TensorChange(
        name, result.a, result.b, a.size, differing, _rounded(distance),
        _rounded(distance / largest) if largest else None, _rounded(float(np.vdot(x, y)) / norms) if norms else None,
    )  # fmt: skip


def compare_manifests(a: Manifest, b: Manifest) -> tuple[Change, ...]:
    """The fields that differ, with dots between levels; files are left to :func:`compare_files`."""
    return changes(_fields(a), _fields(b))


def compare_files(a: Mapping[str, FileDigest], b: Mapping[str, FileDigest]) -> tuple[Change, ...]:
    """The files that were added, removed or changed, with their digests and sizes."""
    found = changes(a, b)
    return tuple(
        Change(c.name, *(vars(side) if isinstance(side, FileDigest) else None for side in (c.a, c.b))) for c in found
    )


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    """What two mappings hold under one name and is not equal, by name.

    >>> changes({"x": 1, "y": 2}, {"y": 3})
    (Change(name='x', a=1, b=None), Change(name='y', a=2, b=3))
    """
    names = sorted(a.keys() | b.keys())
    return tuple(Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def _fields(manifest: Manifest) -> dict[str, object]:
    document = manifest.to_json()
    del document["files"]
    return _flat(document, "")


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            result |= _flat(item, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = item
    return result


def _ports(model: Model) -> dict[str, str]:
    sides = {"input": model.inputs, "output": model.outputs}
    return {
        f"{side} {port.name}": f"{port.type} {'×'.join(map(str, port.shape))}"
        for side, ports in sides.items()
        for port in ports
    }


def _described(values: np.ndarray) -> str:
    kind = "text" if values.dtype.kind == "U" else str(values.dtype)
    return f"{kind} {'×'.join(map(str, values.shape)) or 'scalar'}"


def _rounded(value: float) -> float:
    """Four digits: enough to judge a difference, too few to find what it was made of."""
    return float(f"{value:.4g}")
