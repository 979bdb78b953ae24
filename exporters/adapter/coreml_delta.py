"""``coreml-delta.json``: where a device's Core ML weights differ from the base's, by tensor of the adapter file.

Base and device have the same program, so their ``weight.bin`` have the same layout and differ in the values of some
entries alone. Each of these is one tensor of :func:`exporters.adapter.adapter_file.device_tensors`, rounded to the
entry's type: to the nearest value, or, as coremltools does with constants of few values, so that none becomes zero.
Where the program itself differs (small constants lie in it, not in ``weight.bin``), the adapter package
carries the device's under the path it has in the full package. Numpy only: devices read this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporters.manifest import shown
from exporters.mil.weights import stored_entries
from keys.errors import InputError, PackageError

DELTA_NAME = "coreml-delta.json"
_SCHEMA = 1
_NONZERO = "float16-nonzero"
# How a tensor is rounded → the type of the entry that it goes into.
_ROUNDINGS = {_NONZERO: "float16", "float16": "float16", "float32": "float32"}
# Types of entries by their number; all others are no floats.
_FLOATS = {1: "float16", 2: "float32"}


@dataclass(frozen=True)
class Slot:
    """``length`` bytes at ``offset`` of a ``weight.bin`` that hold ``tensor``, rounded as :func:`rounded` does."""

    offset: int
    length: int
    rounding: str
    tensor: str


@dataclass(frozen=True)
class CoreMLDelta:
    """How one ``.mlpackage`` at ``path`` of the base differs; ``weights_sha256``: of the device's ``weight.bin``."""

    path: str
    weights_sha256: str
    slots: tuple[Slot, ...]

    def apply(self, weights: bytes, tensors: Mapping[str, np.ndarray]) -> bytearray:
        """The device's ``weight.bin`` from the base's and the device's own tensors.

        Raises :class:`PackageError` if they do not fit together, or the result is not what the factory had.
        """
        result = bytearray(weights)
        for slot in self.slots:
            tensor = tensors.get(slot.tensor)
            values = b"" if tensor is None or tensor.dtype != np.float32 else rounded(tensor, slot.rounding)
            if len(values) != slot.length or slot.offset + slot.length > len(result):
                raise PackageError(
                    f"{DELTA_NAME} puts {slot.length} bytes of {shown(slot.tensor)} at byte {slot.offset} of "
                    f"{self.path}, which the adapter or the base has not; get the adapter package again."
                )
            result[slot.offset : slot.offset + slot.length] = values
        if hashlib.sha256(result).hexdigest() != self.weights_sha256:
            raise PackageError(
                f"The weights assembled for {self.path} are not the factory's; get base and adapter package again."
            )
        return result


def rounded(tensor: np.ndarray, rounding: str) -> bytes:
    """The bytes of a float32 tensor as float32, as float16, or as float16 with no value but zero rounded to zero.

    >>> np.frombuffer(rounded(np.array([0, 1e-9, -1e-9], np.float32), "float16-nonzero"), np.float16)
    array([ 0.e+00,  6.e-08, -6.e-08], dtype=float16)
    """
    if rounding == "float32":
        return tensor.astype("<f4").tobytes()
    values = tensor.astype("<f2")
    if rounding == _NONZERO:
        lost = (values == 0) & (tensor != 0)
        values[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, tensor[lost])
    return values.tobytes()


def find_delta(path: str, base: bytes, device: bytes, tensors: Mapping[str, np.ndarray]) -> CoreMLDelta:
    """The delta between two ``weight.bin``, where every difference is one of the device's own ``tensors``.

    Raises :class:`InputError` if the two have other layouts or differ in anything else.
    """
    entries = stored_entries(base)
    if len(base) != len(device) or entries != stored_entries(device):
        raise InputError(
            f"LoRA-only is not possible for this model: the weights of {path} lie otherwise in the base than in the "
            "device's package; send the full package."
        )
    names = {
        (dtype, hashlib.sha256(rounded(tensor, rounding)).digest()): (rounding, name)
        for rounding, dtype in _ROUNDINGS.items()
        for name, tensor in tensors.items()
        if tensor.dtype == np.float32
    }
    slots = []
    for kind, offset, length in entries:
        values = device[offset : offset + length]
        if values == base[offset : offset + length]:
            continue
        found = names.get((_FLOATS.get(kind, ""), hashlib.sha256(values).digest()))
        if found is None:
            raise InputError(
                f"LoRA-only is not possible for this model: {length} bytes at byte {offset} of the weights of {path} "
                "are no tensor of its adapter; send the full package."
            )
        slots.append(Slot(offset, length, *found))
    return CoreMLDelta(path, hashlib.sha256(device).hexdigest(), tuple(slots))


def deltas_to_bytes(deltas: Sequence[CoreMLDelta]) -> bytes:
    """The bytes of ``coreml-delta.json``."""
    packages = [asdict(delta) for delta in deltas]
    return json.dumps({"schema": _SCHEMA, "packages": packages}, indent=1, sort_keys=True).encode("ascii") + b"\n"


def parse_deltas(data: bytes) -> tuple[CoreMLDelta, ...]:
    """Read ``coreml-delta.json``, from a package whose signature was checked; raises PackageError if damaged."""
    try:
        document: Any = json.loads(data)
        if document["schema"] != _SCHEMA:
            raise PackageError(
                f"{DELTA_NAME} has schema {shown(document['schema'])}, not the {_SCHEMA} that this program reads; "
                "update keyfoundry."
            )
        return tuple(_delta(entry) for entry in document["packages"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(f"{DELTA_NAME} is damaged; get the adapter package again.") from error


def _delta(entry: Any) -> CoreMLDelta:
    slots = tuple(Slot(**slot) for slot in entry["slots"])
    for slot in slots:
        whole = all(type(number) is int and number >= 0 for number in (slot.offset, slot.length))
        if not whole or slot.rounding not in _ROUNDINGS or type(slot.tensor) is not str:
            raise ValueError(f"no slot: {slot}")
    path, digest = entry["path"], entry["weights_sha256"]
    if type(path) is not str or type(digest) is not str:
        raise ValueError("no path or digest")
    return CoreMLDelta(path, digest, slots)
