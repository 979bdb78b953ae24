"""Convert once, patch per device: a conversion with the weights cut out, and where they belong.

Converting a ViT takes seconds to minutes, and for two devices of one fleet the results differ in weights only. So
the files of one conversion become a *template*: their bytes without the weights (the skeleton), and for each
stretch that was cut out (a slot) which tensor of the module belongs there and in which encoding. A device is then
written by copying the skeleton and encoding its tensors into the slots.

No knowledge of a format decides what is a slot. A *probe*, the same module with random numbers for weights, is
converted; wherever the bytes of one of its tensors stand, in some encoding, is a slot. That this is all is then
proven, not assumed: a device that was converted in full must come out of the template byte for byte. A model for
which that fails is never patched. A template holds no device's weights, not even the base's.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.encodings import ENCODINGS, Weight, encode
from exporters.manifest import FileDigest, file_name_fault
from exporters.mil.weights import stored_entries
from exporters.onnx_file import stored_tensors
from keys.errors import InputError
from keys.files import folder_being_written, write_atomic

_RECORD = "template.json"
_BLOCK = 2**22
# Searched byte by byte only in small files: programs, which hold small tensors in line.
_LARGEST_SEARCHED = 2**25
_SHORTEST_FOUND = 4
# Below float16's range: encodings that round such numbers in different ways must not look alike in a probe.
_TINY = 1e-9


class TemplateError(InputError):
    """The template does not fit the model, or is damaged; the model has to be converted in full."""


@dataclass(frozen=True)
class Slot:
    """``length`` bytes at ``offset`` of the file hold ``tensor`` in ``encoding`` (see :mod:`exporters.encodings`)."""

    offset: int
    length: int
    tensor: str
    encoding: str


@dataclass(frozen=True)
class TemplateFile:
    """One file: its ``size`` in bytes, its slots by offset, and ``skeleton``, all its bytes outside of them."""

    size: int
    slots: tuple[Slot, ...]
    skeleton: bytes


@dataclass(frozen=True)
class Template:
    """``made_from`` names what it was converted from and by; ``tensors``: name → type and shape, as text."""

    made_from: str
    tensors: Mapping[str, str]
    files: Mapping[str, TemplateFile]


def device_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """The tensors of a module that may differ between devices: its state, float32 or int64, by name, as views.

    Raises :class:`TemplateError` if one is of another type.
    """
    tensors = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in module.state_dict().items()}
    for name, values in tensors.items():
        if values.dtype not in (np.float32, np.int64):
            raise TemplateError(f"The tensor {name} is {values.dtype}; convert the model to float32 first.")
    return tensors


def probe_of(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``module`` with random weights and permutations, the same for every module of these shapes."""
    probe = copy.deepcopy(module)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for tensor in probe.state_dict().values():
            if tensor.is_floating_point():
                values = np.asarray(generator.standard_normal(tensor.shape, np.float32) * np.float32(0.05))
                # A tensor of one value is that value alone, which must tell it from others of its kind.
                values.reshape(-1)[:1] = _TINY if values.size > 1 else _TINY * generator.uniform(1, 2)
                tensor.copy_(torch.from_numpy(values))
            elif is_permutation(tensor):
                tensor.copy_(torch.from_numpy(generator.permutation(tensor.numel())).view(tensor.shape))
    return probe


def is_permutation(tensor: torch.Tensor) -> bool:
    """Whether it holds the integers from 0 on, each once, in any order: what a key decides."""
    whole = tensor.ndim > 0 and tensor.dtype == torch.int64
    return whole and torch.equal(tensor.flatten().sort().values.cpu(), torch.arange(tensor.numel()))


def make_template(converted: Path, tensors: Mapping[str, np.ndarray], made_from: str) -> Template:
    """The template of the files in ``converted``, which a probe with these ``tensors`` was converted to."""
    encoded = _Encoded(tensors)
    files: dict[str, TemplateFile] = {}
    for path in sorted(path for path in converted.rglob("*") if path.is_file()):
        data = path.read_bytes()
        slots = tuple(_slots(path.name, data, encoded))
        skeleton = b"".join(bytes(data[start:end]) for start, end in _outside(slots, len(data)))
        files[path.relative_to(converted).as_posix()] = TemplateFile(len(data), slots, skeleton)
    return Template(made_from, _signature(tensors), files)


def patch(template: Template, tensors: Mapping[str, np.ndarray], folder: Path) -> dict[str, FileDigest]:
    """Write the template's files with these ``tensors`` into ``folder``; return their digests.

    Raises :class:`TemplateError` before anything is written if a name, type or shape differs, and
    :class:`InputError` naming a tensor with NaN, infinite or (in float16) too large values.
    """
    check_fit(template, tensors)
    weights = _weights(tensors)
    digests = {}
    for name, file in template.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = FileDigest(_write(path, _parts(file, weights)), file.size)
    return digests


def _write(path: Path, parts: Iterator[memoryview]) -> str:
    """Write a file and return its SHA-256. (In this thread: another one costs more than the hash does.)"""
    digest = hashlib.sha256()
    with path.open("wb", buffering=_BLOCK) as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def check_fit(template: Template, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise :class:`TemplateError` naming the first tensor whose name, type or shape is another."""
    found = _signature(tensors)
    for name in sorted({*template.tensors, *found}):
        wanted, there = template.tensors.get(name, "missing"), found.get(name, "missing")
        if wanted != there:
            raise TemplateError(f"the tensor {name} is {there} in the model and {wanted} in the template")


def prove(template: Template, tensors: Mapping[str, np.ndarray], converted: Path) -> str | None:
    """What differs between the template with these ``tensors`` and their full conversion; None if nothing does."""
    present = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    if present != set(template.files):
        return f"there are other files: {', '.join(sorted(present ^ set(template.files)))}"
    for name, file in template.files.items():
        if (converted / name).stat().st_size != file.size:
            return f"{name} has another length"
        position, weights = 0, _weights(tensors)
        with (converted / name).open("rb") as stream:
            for part in _parts(file, weights):
                if memoryview(stream.read(len(part))) != part:
                    return f"{name} differs between byte {position} and {position + len(part)}"
                position += len(part)
    return None


def save_template(template: Template, folder: Path) -> None:
    """Write the template as ``folder``, whole or not at all."""
    with folder_being_written(folder) as temporary:
        files: dict[str, Any] = {}
        for index, (name, file) in enumerate(template.files.items()):
            write_atomic(temporary / f"{index}.skeleton", file.skeleton)
            files[name] = {
                "skeleton": f"{index}.skeleton", "sha256": hashlib.sha256(file.skeleton).hexdigest(), "size": file.size,
                "slots": [list(asdict(slot).values()) for slot in file.slots],
            }  # fmt: skip
        body = {"made_from": template.made_from, "tensors": dict(template.tensors), "files": files}
        write_atomic(temporary / _RECORD, _canonical({"body": body, "sha256": _body_digest(body)}))


def load_template(folder: Path, made_from: str) -> Template | None:
    """The template in ``folder``, None if there is none.

    Raises :class:`TemplateError` if it is damaged or was made from something else.
    """
    if not (folder / _RECORD).is_file():
        return None
    try:
        document = json.loads((folder / _RECORD).read_bytes())
        body = document["body"]
        if document["sha256"] != _body_digest(body):
            raise TemplateError(f"{folder / _RECORD} is damaged")
        if body["made_from"] != made_from:
            raise TemplateError("it was made from another base, fleet or settings, or by other versions of tools")
        files = {name: _load_file(folder, name, entry) for name, entry in body["files"].items()}
        return Template(made_from, {str(name): str(kind) for name, kind in body["tensors"].items()}, files)
    except TemplateError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TemplateError(f"the template in {folder} is damaged") from error


def _load_file(folder: Path, name: str, entry: Any) -> TemplateFile:
    skeleton = (folder / str(entry["skeleton"])).read_bytes()
    slots = tuple(Slot(int(offset), int(length), str(t), str(e)) for offset, length, t, e in entry["slots"])
    file = TemplateFile(int(entry["size"]), slots, skeleton)
    inside = sum(slot.length for slot in slots)
    if (
        hashlib.sha256(skeleton).hexdigest() != entry["sha256"]
        or file_name_fault(name)
        or len(skeleton) + inside != file.size
        or any(slot.encoding not in ENCODINGS for slot in slots)
    ):
        raise TemplateError(f"the template's part for {name} is damaged")
    return file


def _body_digest(body: Any) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _signature(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{values.dtype} {'×'.join(map(str, values.shape))}".strip() for name, values in tensors.items()}


def _weights(tensors: Mapping[str, np.ndarray]) -> dict[str, Weight]:
    return {name: Weight(name, values) for name, values in tensors.items()}


def _parts(file: TemplateFile, weights: Mapping[str, Weight]) -> Iterator[memoryview]:
    """The file's bytes in order, a few MiB at a time."""
    skeleton, read, position = memoryview(file.skeleton), 0, 0
    for slot in (*file.slots, None):
        end = file.size if slot is None else slot.offset
        yield from _blocks(skeleton[read : read + end - position])
        read += end - position
        if slot is None:
            return
        values = encode(slot.encoding, weights[slot.tensor])
        if len(values) != slot.length:
            raise TemplateError(f"the tensor {slot.tensor} takes {len(values)} bytes, not {slot.length}")
        yield from _blocks(values)
        position = slot.offset + slot.length


def _blocks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _BLOCK):
        yield view[start : start + _BLOCK]


def _outside(slots: tuple[Slot, ...], size: int) -> Iterator[tuple[int, int]]:
    position = 0
    for slot in slots:
        yield position, slot.offset
        position = slot.offset + slot.length
    yield position, size


# ---- where the weights lie --------------------------------------------------------------------------------------


class _Encoded:
    """The tensors in all their encodings, each made when it is first asked for and kept as a digest."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._weights = _weights(tensors)
        self._by_length: dict[int, list[tuple[str, str]]] = {}
        self._digests: dict[tuple[str, str], bytes] = {}
        for encoding, kind in ENCODINGS.items():
            for name, values in tensors.items():
                length = kind.length(values)
                if length is not None:
                    length = length or len(encode(encoding, self._weights[name]))
                    self._by_length.setdefault(length, []).append((name, encoding))

    def found(self, data: memoryview) -> tuple[str, str] | None:
        """The tensor and the encoding of which these are the bytes; None if two tensors look alike in them."""
        digest = hashlib.sha256(data).digest()
        keys = [key for key in self._by_length.get(len(data), []) if self._digest(*key) == digest]
        return keys[0] if keys and all(self._is_one(keys[0][0], name) for name, _ in keys) else None

    def _digest(self, name: str, encoding: str) -> bytes:
        key = (name, encoding)
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(encode(encoding, self._weights[name])).digest()
        return self._digests[key]

    def _is_one(self, first: str, second: str) -> bool:
        """Whether two names are of one tensor, which modules share."""
        return first == second or np.shares_memory(self._weights[first].values, self._weights[second].values)

    def each(self, longest: int) -> Iterator[tuple[str, str, bytes]]:
        """Every tensor in every encoding that is not longer than the program in which it may lie in line."""
        for length, keys in sorted(self._by_length.items(), reverse=True):
            if _SHORTEST_FOUND <= length <= longest:
                for name, encoding in keys:
                    values = encode(encoding, self._weights[name])
                    if self.found(values) is not None:
                        yield name, encoding, bytes(values)


def _slots(name: str, data: bytes, encoded: _Encoded) -> list[Slot]:
    if name.endswith(".onnx"):
        places = [(tensor.offset, tensor.length) for tensor in stored_tensors(data)]
    elif name == "weight.bin":
        places = [(start, length) for _, start, length in stored_entries(data)]
    else:
        return _searched(data, encoded) if len(data) <= _LARGEST_SEARCHED else []
    slots = []
    for offset, length in places:
        key = encoded.found(memoryview(data)[offset : offset + length])
        if key is not None:
            slots.append(Slot(offset, length, *key))
    return sorted(slots, key=lambda slot: slot.offset)


def _searched(data: bytes, encoded: _Encoded) -> list[Slot]:
    """Tensors that lie somewhere in a small file; of two that overlap the longer one counts."""
    slots: list[Slot] = []
    for name, encoding, values in encoded.each(len(data)):
        offset = data.find(values)
        while offset >= 0:
            end = offset + len(values)
            if all(end <= slot.offset or slot.offset + slot.length <= offset for slot in slots):
                slots.append(Slot(offset, len(values), name, encoding))
            offset = data.find(values, end)
    return sorted(slots, key=lambda slot: slot.offset)
