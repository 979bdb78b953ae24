"""The validator that runs on a device: is this package ours, and does it do here what the factory saw?

It opens the package (signature, digests, device), loads the model from the very bytes that were checked, runs
the golden images again, measures latency, and accuracy where labelled images are given, and returns a
receipt. An adapter package is put on its base package, which is verified in the same way. Rules of this module:
standard library, numpy, onnxruntime and cryptography only (coremltools is loaded by the Core ML runtime alone). A
package that cannot be trusted or run is an error; one that runs but does not reproduce what was signed is a receipt
that did not pass.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from device_tests.accuracy import accuracy
from device_tests.evidence import Measured, Proportion
from device_tests.images import from_8bit
from device_tests.labelled_images import read_labelled_images
from device_tests.latency import measure_latency
from device_tests.receipt import Receipt
from exporters.adapter.pair import assemble_one, open_base_of, run_on_base
from exporters.golden import GOLDEN_NAME, Golden, read_golden
from exporters.manifest import Manifest, utc_text
from exporters.measured import NotMeasured
from exporters.package import OpenPackage, open_package
from exporters.parity import COREML_FP16, ONNX_FP32, Parity, ParityLimits, compare
from exporters.runtime import Runtime
from keys.errors import InputError, PackageError


@dataclass(frozen=True)
class DeviceRuntime:
    """A way to run a package's model.

    ``load`` gets the package and an empty private folder to unpack into, ``load_on_base`` an adapter package, its base
    and such a folder; ``distribution`` is the installed one whose version the receipt names; ``limits`` are those that
    the factory's parity check used.
    """

    load: Callable[[OpenPackage, Path], Runtime]
    load_on_base: Callable[[OpenPackage, OpenPackage, Path], Runtime]
    distribution: str
    limits: ParityLimits


def validate(
    folder: Path,
    public_key: bytes,
    *,
    device_id: str | None = None,
    data: Path | None = None,
    minimum_accuracy: float | None = None,
    base: Path | None = None,
    runtime: DeviceRuntime,
) -> Receipt:
    """Check the package in ``folder`` and run its model on this device.

    ``public_key``: the factory's, 32 raw bytes. ``device_id``: this device's, where it is known. ``data``: an
    .npz file of labelled images (see :mod:`device_tests.labelled_images`); the accuracy on them must reach
    ``minimum_accuracy`` (a share in [0, 1]) where given. ``base``: for an adapter package the folder of the base
    package that it runs on. Raises :class:`PackageError` if a package is refused and :class:`InputError` if the data or
    the runtime cannot be used.
    """
    if minimum_accuracy is not None and not 0 <= minimum_accuracy <= 1:
        raise InputError(f"The minimum accuracy must lie between 0 and 1, not {minimum_accuracy}.")
    if minimum_accuracy is not None and data is None:
        raise InputError("A minimum accuracy needs labelled images to measure it on; give them with --data.")
    package = open_package(folder, public_key, device_id=device_id)
    manifest = package.manifest
    if base is not None and manifest.kind != "adapter":
        raise InputError(f"A package of kind {manifest.kind} runs by itself; leave out --base.")
    below = open_base_of(package, base, public_key) if manifest.kind == "adapter" else None
    golden = read_golden(package.read(GOLDEN_NAME), manifest.input, len(manifest.labels))
    labelled = None if data is None else read_labelled_images(data, manifest.input, len(manifest.labels))
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as scratch:
        place = Path(scratch)
        model = runtime.load(package, place) if below is None else runtime.load_on_base(package, below, place)
        parity = _run_golden(model, golden, runtime.limits, manifest)
        measured: Measured = NotMeasured("no labelled images were given")
        if labelled is not None:
            measured = accuracy(model, labelled.images, labelled.labels)
        latency = measure_latency(model, from_8bit(golden.images[:1]))
    return Receipt(
        package_digest=package.digest,
        device_id=manifest.device_id,
        generation=manifest.generation,
        fleet_id=manifest.fleet_id,
        runtime=model.name,
        runtime_version=version(runtime.distribution),
        platform=platform.platform(),
        golden=parity,
        accuracy=measured,
        latency=latency,
        created=utc_text(datetime.now(UTC)),
        reasons=_reasons(parity, measured, minimum_accuracy),
    )


def _load_onnx(package: OpenPackage, scratch: Path) -> Runtime:
    from exporters.run_onnx import OnnxRuntime

    return OnnxRuntime(package.read("model.onnx"))


def _load_onnx_on_base(package: OpenPackage, base: OpenPackage, scratch: Path) -> Runtime:
    return run_on_base(package, base, scratch)


def _load_core_ml(package: OpenPackage, scratch: Path) -> Runtime:
    from exporters.run_coreml import CoreMLPredict

    # coremltools loads from a path only: from a private copy, nobody else can change it after the check.
    return CoreMLPredict(package.copy_folder("model.mlpackage", scratch))


def _load_core_ml_on_base(package: OpenPackage, base: OpenPackage, scratch: Path) -> Runtime:
    from exporters.run_coreml import CoreMLPredict

    return CoreMLPredict(assemble_one(package, base, "model.mlpackage", scratch))


ONNXRUNTIME = DeviceRuntime(_load_onnx, _load_onnx_on_base, "onnxruntime", ONNX_FP32)
CORE_ML = DeviceRuntime(_load_core_ml, _load_core_ml_on_base, "coremltools", COREML_FP16)

# The names that ``--runtime`` takes.
RUNTIMES = {"onnxruntime": ONNXRUNTIME, "coreml": CORE_ML}


def _run_golden(model: Runtime, golden: Golden, limits: ParityLimits, manifest: Manifest) -> Parity:
    logits = model.logits(from_8bit(golden.images))
    if logits.shape != golden.logits.shape:
        raise PackageError(
            f"The model gives {logits.shape[-1]} logits, but the manifest names {len(manifest.labels)} "
            "classes; get the package again from the factory."
        )
    return compare(
        golden.logits,
        logits,
        limits.difference,
        limits.top1,
        runtime=model.name,
        precision=limits.precision,
    )


def _reasons(parity: Parity, measured: Measured, minimum_accuracy: float | None) -> tuple[str, ...]:
    """One sentence for every check that ran and failed."""
    reasons = []
    if not parity.passed:
        reasons.append(
            "The golden images' logits differ from the factory's by up to "
            f"{parity.max_relative_difference:.2g} of the largest logit (limit {parity.limit:g}), with the "
            f"same class on {parity.top1_agreement:.1%} (limit {parity.top1_limit:.1%})."
        )
    minimum = minimum_accuracy or 0.0
    if isinstance(measured, Proportion) and measured.value < minimum:
        low, high = measured.interval
        reasons.append(
            f"The accuracy is {measured.value:.4f} on {measured.n} images (95 % interval {low:.4f} to "
            f"{high:.4f}), below the minimum of {minimum:.4f}."
        )
    return tuple(reasons)
