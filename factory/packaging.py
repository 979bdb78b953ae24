"""From a trained model to an unsigned package, with the evidence that each format computes the same function."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from torch import nn

from exporters.golden import GOLDEN_NAME, Golden
from exporters.manifest import Manifest, utc_text
from exporters.measured import NotMeasured
from exporters.package import digest_folder, inspect_package, write_package
from exporters.parity import COREML_FP16, COREML_FP32, ONNX_FP32, Parity, measure_parity
from exporters.run_coreml import best_coreml_runtime
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from exporters.to_coreml import export_coreml
from exporters.to_onnx import export_onnx
from factory.base import Base
from factory.progress import Progress
from factory.record import kept
from keys.errors import PackageError
from keys.files import folder_being_written, write_atomic

ONNX_NAME = "model.onnx"
COREML_NAME = "model.mlpackage"
COREML_FP32_NAME = "model-fp32.mlpackage"
LIMITS = {"ONNX fp32": ONNX_FP32, "Core ML fp32": COREML_FP32, "Core ML fp16": COREML_FP16}
_GOLDEN_IMAGES = 8
TOOLS = ("keyfoundry", "torch", "timm", "peft", "onnx", "onnxruntime", "coremltools", "numpy", "cryptography")


@dataclass(frozen=True)
class Identity:
    """What a package says about where it comes from."""

    device_id: str
    generation: int
    fleet_id: str
    adapter_digest: str
    recipe: Mapping[str, object]


def tool_versions() -> dict[str, str]:
    """Name → version of every tool that has a part in a package."""
    return {name: importlib.metadata.version(name) for name in TOOLS} | {"python": platform.python_version()}


def export_package(
    module: nn.Module, base: Base, identity: Identity, golden_images: np.ndarray, package: Path, progress: Progress
) -> Manifest:
    """Write the unsigned package of a baked ``module``, unless it is there, whole and made from the same adapter.

    ``golden_images``: uint8 N×C×H×W, of which the first few travel in the package with torch's logits.
    """
    existing = _existing(package, identity, base)
    if existing is not None:
        return existing
    contract, labels = base.architecture.contract, base.architecture.labels
    with (
        folder_being_written(package) as folder,
        progress.stage(f"export {identity.device_id}", total=4, unit="files") as stage,
    ):
        export_onnx(module, folder / ONNX_NAME, contract, labels)
        stage.advance(note="Core ML fp16")
        export_coreml(module, folder / COREML_NAME, contract, labels, precision="fp16")
        stage.advance(note="Core ML fp32")
        export_coreml(module, folder / COREML_FP32_NAME, contract, labels, precision="fp32")
        stage.advance(note="manifest")
        images = golden_images[:_GOLDEN_IMAGES]
        logits = TorchRuntime(module).logits(images.astype(np.float32) / 255)
        write_atomic(folder / GOLDEN_NAME, Golden(images, logits).to_bytes())
        manifest = Manifest(
            **asdict(identity), base_digest=base.digest, labels=labels, input=contract, files={}, evidence={},
            created=utc_text(datetime.now(UTC)), tools=tool_versions(),
        )  # fmt: skip
        manifest = write_package(folder, manifest)
        stage.advance()
    return manifest


def _existing(package: Path, identity: Identity, base: Base) -> Manifest | None:
    if not package.is_dir():
        return None
    try:
        manifest, _ = inspect_package(package)
        whole = digest_folder(package) == dict(manifest.files)
    except PackageError:
        return None
    same = all(getattr(manifest, name) == value for name, value in vars(identity).items())
    return manifest if whole and same and manifest.base_digest == base.digest else None


def open_formats(package: Path) -> dict[str, Runtime]:
    """Every format of a package, ready to run."""
    return {
        "ONNX fp32": OnnxRuntime(package / ONNX_NAME),
        "Core ML fp32": best_coreml_runtime(package / COREML_FP32_NAME),
        "Core ML fp16": best_coreml_runtime(package / COREML_NAME),
    }


def parity_of(
    module: nn.Module, package: Path, images: np.ndarray, record: Path, progress: Progress
) -> dict[str, Parity | NotMeasured]:
    """Compare every format of a package with torch on uint8 ``images``; cached in ``record`` by content."""
    manifest, _ = inspect_package(package)
    made_from = hashlib.sha256(
        repr([sorted((name, entry.sha256) for name, entry in manifest.files.items()), tool_versions(), LIMITS]).encode()
        + platform.platform().encode()
        + images.tobytes()
    ).hexdigest()

    def measure() -> dict[str, Parity | NotMeasured]:
        candidates = open_formats(package)
        measured: dict[str, Parity | NotMeasured] = {}
        reference = TorchRuntime(module)
        floats = images.astype(np.float32) / 255
        with progress.stage(f"parity {manifest.device_id}", total=len(candidates), unit="formats") as stage:
            for name, runtime in candidates.items():
                measured[name] = measure_parity(reference, runtime, floats, LIMITS[name])
                stage.advance(note=name)
        return measured

    return kept(
        record, made_from, compute=measure,
        to_json=lambda measured: {name: parity.to_json() for name, parity in measured.items()},
        from_json=lambda stored: {name: Parity.from_json(value) for name, value in stored.items()},
    )  # fmt: skip
