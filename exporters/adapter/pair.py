"""A device's adapter package and its fleet's base package, opened together; and what they make of Core ML."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporters.adapter.adapter_file import ADAPTER_NAME, device_tensors, read_adapter
from exporters.adapter.coreml_delta import DELTA_NAME, CoreMLDelta, parse_deltas
from exporters.adapter.run_adapter import AdapterRuntime
from exporters.formats import FORMATS
from exporters.mil.program import WEIGHTS_PATH
from exporters.onnx_file import stored_tensors
from exporters.package import OpenPackage, open_package
from keys.errors import InputError, PackageError
from keys.files import folder_being_written, write_atomic

BASE_ONNX = FORMATS["onnx-fp32"].path


def open_base_of(adapter: OpenPackage, folder: Path | None, public_key: bytes) -> OpenPackage:
    """The base package in ``folder``, verified, on which ``adapter`` runs.

    Raises :class:`PackageError` if none was given, it is refused, or it is not the one that the adapter requires.
    """
    if folder is None:
        raise PackageError("This is an adapter package, which does not run by itself; give its base with --base.")
    base = open_package(folder, public_key, fleet_id=adapter.manifest.fleet_id)
    if base.manifest.kind != "base":
        raise PackageError(f"{folder} holds a package of kind {base.manifest.kind}, not base; give the base package.")
    if base.digest != adapter.manifest.requires:
        raise PackageError(
            f"The adapter runs on the base package whose manifest has the SHA-256 {adapter.manifest.requires}, not on "
            f"{base.digest}; get that base package."
        )
    return base


def run_on_base(adapter: OpenPackage, base: OpenPackage, scratch: Path) -> AdapterRuntime:
    """Base and adapter ready to run in onnxruntime; the adapter is unpacked to the private folder ``scratch``."""
    path = scratch / ADAPTER_NAME
    write_atomic(path, adapter.read(ADAPTER_NAME), mode=0o600)
    return AdapterRuntime(base.read(BASE_ONNX), path)


def assemble_coreml(adapter: OpenPackage, base: OpenPackage, destination: Path) -> tuple[Path, ...]:
    """Write the device's Core ML packages, byte for byte those of its full package, and return their folders.

    ``destination`` is a new folder, which appears whole or not at all. Raises :class:`PackageError` if base and
    adapter do not fit or do not give what the factory had, and :class:`InputError` if ``destination`` exists.
    """
    if destination.exists():
        raise InputError(f"{destination} exists already; give the path of a new folder.")
    deltas = _deltas(adapter)
    tensors = _tensors(adapter, base)
    with folder_being_written(destination) as folder:
        folder.chmod(0o700)  # in clear, these weights give the device's key away
        for delta in deltas:
            _assemble(delta, tensors, adapter, base, folder)
    return tuple(destination / delta.path for delta in deltas)


def assemble_one(adapter: OpenPackage, base: OpenPackage, path: str, scratch: Path) -> Path:
    """Only the Core ML package ``path``, below the private folder ``scratch``; errors as in assemble_coreml."""
    for delta in _deltas(adapter):
        if delta.path == path:
            _assemble(delta, _tensors(adapter, base), adapter, base, scratch)
            return scratch / path
    raise PackageError(f"The adapter package has no delta for {path}; get one that was exported with it.")


def _deltas(adapter: OpenPackage) -> tuple[CoreMLDelta, ...]:
    if DELTA_NAME not in adapter.manifest.files:
        raise PackageError("The adapter package has no Core ML delta; get one that was exported with it.")
    return parse_deltas(adapter.read(DELTA_NAME))


def _tensors(adapter: OpenPackage, base: OpenPackage) -> dict[str, np.ndarray]:
    data = base.read(BASE_ONNX)
    stored = {tensor.name: tensor.read(data) for tensor in stored_tensors(data)}
    return device_tensors(stored, read_adapter(adapter.read(ADAPTER_NAME)))


def _assemble(
    delta: CoreMLDelta, tensors: dict[str, np.ndarray], adapter: OpenPackage, base: OpenPackage, folder: Path
) -> None:
    weights = f"{delta.path}/{WEIGHTS_PATH}"
    files = [name for name in base.manifest.files if name.startswith(f"{delta.path}/")]
    if weights not in files:
        raise PackageError(f"The base package has no {weights}; get one that was exported with it.")
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == weights:
            target.write_bytes(delta.apply(base.read(name), tensors))
        else:
            target.write_bytes((adapter if name in adapter.manifest.files else base).read(name))
