"""From a trained model to an unsigned package, with the evidence that each format computes the same function."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from exporters.export import ExportPlan, Templates, export
from exporters.formats import FORMATS
from exporters.golden import GOLDEN_NAME, Golden
from exporters.manifest import SIGNATURE_NAME, FileDigest, Manifest, utc_text
from exporters.measured import NotMeasured
from exporters.package import inspect_package, whole_package, write_package
from exporters.parity import Parity, ParityLimits, measure_parity
from exporters.run_coreml import CoreMLEvaluator, best_coreml_runtime
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from factory.base import Base
from factory.progress import Progress
from factory.record import kept
from factory.settings import ExportSettings
from keys.files import folder_being_written, write_atomic

ONNX_NAME = FORMATS["onnx-fp32"].path
_GOLDEN_IMAGES = 8
TOOLS = ("keyfoundry", "torch", "timm", "peft", "onnx", "onnxruntime", "coremltools", "numpy", "cryptography")


@dataclass(frozen=True)
class Identity:
    """What a package says about where it comes from. ``created``: when its model was trained, UTC."""

    device_id: str
    generation: int
    fleet_id: str
    adapter_digest: str
    recipe: Mapping[str, object]
    created: datetime

    def fields(self) -> dict[str, Any]:
        """The manifest's fields of the same names."""
        return vars(self) | {"created": utc_text(self.created)}


def tool_versions() -> dict[str, str]:
    """Name → version of every tool that has a part in a package."""
    return {name: importlib.metadata.version(name) for name in TOOLS} | {"python": platform.python_version()}


def export_plan(base: Base, settings: ExportSettings, images: np.ndarray) -> ExportPlan:
    """What the settings ask for. ``images``: uint8 validation images; static int8 is calibrated on the first."""
    architecture = base.architecture
    return ExportPlan(
        architecture.contract, architecture.labels, settings.formats, settings.opset, settings.batch, settings.target,
        images[: settings.calibration_images],
    )  # fmt: skip


def fleet_templates(folder: Path, base: Base, fleet_id: str, progress: Progress) -> Templates:
    """The templates of one fleet: of this base, and of the converters that are installed now."""
    made_from = {"fleet_id": fleet_id, "base_digest": base.digest, **tool_versions()}
    return Templates(folder, made_from, progress.say)


def export_package(
    module: nn.Module, base: Base, identity: Identity, golden_images: np.ndarray, package: Path, progress: Progress,
    plan: ExportPlan | None = None, templates: Templates | None = None,
) -> Manifest:  # fmt: skip
    """Write the unsigned package of a baked ``module``, unless it is there, whole and made from the same adapter.

    ``golden_images``: uint8 N×C×H×W, of which the first few travel in the package with torch's logits. The same
    inputs give the same bytes, with ``templates`` or without.
    """
    plan = plan or export_plan(base, ExportSettings(), golden_images)
    existing = _existing(package, identity, base, plan)
    if existing is not None:
        return existing
    if (package / SIGNATURE_NAME).is_file():
        progress.say(f"The released package of {identity.device_id} is replaced; 'verify' judges and signs the next.")
    with (
        folder_being_written(package) as folder,
        progress.stage(f"export {identity.device_id}", total=2, unit="parts") as stage,
    ):
        exported = export(module, folder, plan, templates)
        stage.advance(note="from the template" if exported.from_template else "converted")
        images = golden_images[:_GOLDEN_IMAGES]
        golden = Golden(images, TorchRuntime(module).logits(images.astype(np.float32) / 255)).to_bytes()
        write_atomic(folder / GOLDEN_NAME, golden)
        manifest = Manifest(
            **identity.fields(), base_digest=base.digest, labels=plan.labels,
            input=plan.contract, files={}, evidence={}, tools=tool_versions(), formats=plan.entries(),
        )  # fmt: skip
        manifest = write_package(folder, manifest, dict(exported.digests) | {GOLDEN_NAME: FileDigest.of(golden)})
        stage.advance()
    return manifest


def _existing(package: Path, identity: Identity, base: Base, plan: ExportPlan) -> Manifest | None:
    manifest = whole_package(package)
    if manifest is None:
        return None
    same = all(getattr(manifest, name) == value for name, value in identity.fields().items())
    same = same and manifest.base_digest == base.digest and dict(manifest.formats) == plan.entries()
    return manifest if same else None


def open_formats(package: Path) -> dict[str, Runtime]:
    """Every format of a package, by its title, ready to run."""
    manifest, _ = inspect_package(package)
    formats = [one for one in FORMATS.values() if one.name in manifest.formats]
    return {one.title: open_format(package / one.path, one.runtime) for one in formats}


def open_format(path: Path, runtime: str) -> Runtime:
    """One exported file or folder, ready to run."""
    return best_coreml_runtime(path) if runtime == "coreml" else OnnxRuntime(path)


def parity_of(
    module: nn.Module, package: Path, images: np.ndarray, record: Path, progress: Progress
) -> dict[str, Parity | NotMeasured]:
    """Compare every format of a package with torch on uint8 ``images``; cached in ``record`` by content."""
    manifest, _ = inspect_package(package)
    limits = {one.title: one.limits for one in FORMATS.values() if one.name in manifest.formats}
    made_from = hashlib.sha256(
        repr([sorted((name, entry.sha256) for name, entry in manifest.files.items()), tool_versions(), limits]).encode()
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
                measured[name] = _parity(reference, runtime, floats, limits[name])
                stage.advance(note=name)
        return measured

    return kept(
        record, made_from, compute=measure,
        to_json=lambda measured: {name: parity.to_json() for name, parity in measured.items()},
        from_json=lambda stored: {
            name: NotMeasured.from_json(value) if "not_measured" in value else Parity.from_json(value)
            for name, value in stored.items()
        },
    )  # fmt: skip


def _parity(reference: Runtime, runtime: Runtime, images: np.ndarray, limits: ParityLimits) -> Parity | NotMeasured:
    """Parity of one format; where its logits are not finite, the variable in which that began instead."""
    parity = measure_parity(reference, runtime, images, limits)
    if math.isfinite(parity.max_relative_difference) or not isinstance(runtime, CoreMLEvaluator):
        return parity
    overflow = runtime.first_overflow(images)
    return parity if overflow is None else NotMeasured(f"its logits are not finite, beginning with {overflow}")
