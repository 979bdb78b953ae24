"""The classifier that images are purified for: a package's ONNX model, verified or not, or a plain ONNX file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from pydantic import ValidationError
from torch import Tensor

from device_tests.foreign_source import OnnxFile, read_onnx
from exporters.contract import InputContract
from exporters.formats import FORMATS
from exporters.manifest import FileDigest, Manifest
from exporters.package import inspect_package, open_package
from exporters.package_rules import check_file
from exporters.run_onnx import OnnxRuntime
from exporters.runtime import Runtime
from exporters.to_onnx import LABELS_KEY
from factory.purifier.settings import PurifierSettings
from factory.recipes.purifier import DeepImagePriorPart
from keys.errors import InputError, PackageError
from keys.signing import read_public_key

_ONNX_NAME = FORMATS["onnx-fp32"].path


@dataclass(frozen=True, eq=False)
class Victim:
    """A classifier to ask. ``labels``: class names, or None where the file names none; ``state``: what was checked.

    ``settings``: what its recipe says about purifying, or None. ``digest``: SHA-256 (hex) of the ONNX file;
    ``contract``: None where a plain file leaves the size free.
    """

    where: str
    runtime: Runtime | OnnxFile
    contract: InputContract | None
    labels: tuple[str, ...] | None
    digest: str
    state: str
    settings: PurifierSettings | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits float32 N×K of images float32 N×C×H×W in [0, 1]; raises :class:`InputError` for probabilities."""
        logits = np.asarray(self.runtime.logits(images.detach().numpy()), dtype=np.float32)
        if logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise InputError(f"{self.where} gives probabilities (they sum to one); leave out the last softmax.")
        return torch.from_numpy(logits)

    def name(self, label: int) -> str:
        """What class ``label`` is called."""
        return str(label) if self.labels is None or label >= len(self.labels) else self.labels[label]


def load_victim(path: Path, public_key: Path | None = None) -> Victim:
    """Load the package in the folder ``path``, or the ONNX file ``path``.

    With ``public_key`` (a fleet's signing-key.pub) a package's signature and digests are verified; without it only its
    model's digest against its own manifest. Raises :class:`PackageError` for a package that is refused and
    :class:`InputError` for a file that cannot be run.
    """
    if path.is_dir():
        return _package(path, public_key)
    if public_key is not None:
        raise InputError(f"{path} is no package, and only packages are signed; leave out --public-key.")
    return _file(path)


def _package(folder: Path, public_key: Path | None) -> Victim:
    if public_key is not None:
        package = open_package(folder, read_public_key(public_key))
        manifest, data, state = package.manifest, package.read(_ONNX_NAME), "signature and digests verified"
    else:
        manifest, _ = inspect_package(folder)
        if _ONNX_NAME not in manifest.files:
            raise PackageError(f"The package {folder} has no {_ONNX_NAME}; export it again with that format.")
        try:
            data = (folder / _ONNX_NAME).read_bytes()
        except OSError as error:
            raise PackageError(f"{folder / _ONNX_NAME} cannot be read ({error.strerror}); export it again.") from error
        check_file(manifest, _ONNX_NAME, FileDigest.of(data))
        state = "the package's signature was not verified"
    digest = hashlib.sha256(data).hexdigest()
    return Victim(
        str(folder),
        OnnxRuntime(data),
        manifest.input,
        tuple(manifest.labels),
        digest,
        state,
        _settings(manifest, folder),
    )


def _settings(manifest: Manifest, folder: Path) -> PurifierSettings | None:
    """What the device's recipe says; raises :class:`PackageError` if that is no purifier of this program."""
    if "purifier" not in manifest.recipe:
        return None
    try:
        return DeepImagePriorPart.model_validate(manifest.recipe["purifier"]).settings
    except (ValidationError, InputError) as error:
        raise PackageError(
            f"The package {folder} names a purifier that this program does not know; give a plain ONNX file."
        ) from error


def _file(path: Path) -> Victim:
    data = read_onnx(path)
    runtime = OnnxFile(data, str(path))
    channels, height, width = runtime.shape[1:]
    contract = None
    if all(isinstance(side, int) for side in (channels, height, width)):
        contract = InputContract(channels, height, width, f"to {height}×{width} pixels, as the model was trained")
    named = next(
        (entry.value for entry in onnx.load_model_from_string(data).metadata_props if entry.key == LABELS_KEY), None
    )
    labels = None if named is None else _names(named)
    return Victim(str(path), runtime, contract, labels, hashlib.sha256(data).hexdigest(), "a plain ONNX file")


def _names(text: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(text)
    except ValueError:
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
