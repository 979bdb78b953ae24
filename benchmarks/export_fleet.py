"""A fleet's packages end to end without training: key, shuffle, merge, fold, templates, golden images, manifest.

Every device of a small ViT gets its own key and its own random LoRA update; ONNX and Core ML are exported. Printed are
packages per second and the process's peak memory after each tenth of the fleet: it must not grow with the number of
devices. Run::

    python -m benchmarks.export_fleet --json FILE
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.rounds import write_record
from exporters.package import sign_package
from factory.adaptation import adapt
from factory.base import Base, load_base, read_architecture
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.packaging import Identity, export_package, export_plan, fleet_templates
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from factory.settings import BaseSettings, ExportSettings
from keys.derive import fixed_guess
from keys.signing import SigningKey

CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)


def candidate(base: Base, recipe: RecipeSettings, index: int) -> torch.nn.Module:
    """The baked model of one device: its key's shuffle and a random update instead of a trained one."""
    torch.manual_seed(index)
    adapted = adapt(base.network, recipe)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    shuffle = keyed_transform(base, recipe, fixed_guess(f"device-{index}"))
    return bake(ImageClassifier(adapted, base.architecture.mean, base.architecture.std, shuffle))


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--devices", type=int, default=100)
    made.add_argument("--base", default="shipped", help="or the path of a checkpoint")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    settings = BaseSettings(name=asked.base)
    base = load_base(settings, read_architecture(settings).labels, 0)
    recipe, quiet, signing = RecipeSettings(), Progress(quiet=True), SigningKey(bytes(32))
    images = np.random.default_rng(0).integers(0, 256, (8, *base.architecture.contract.shape), np.uint8)
    plan = export_plan(base, ExportSettings(), images)
    tenth = max(1, asked.devices // 10)
    rows: list[dict[str, float]] = []
    size = 0
    with tempfile.TemporaryDirectory(prefix="keyfoundry-", dir=asked.folder) as name:
        templates = fleet_templates(Path(name) / "templates", base, "0" * 16, quiet)
        start = time.perf_counter()
        first = start
        for index in range(asked.devices):
            identity = Identity(f"device-{index}", 1, "0" * 16, "0" * 64, recipe.model_dump(mode="json"), CREATED)
            package = Path(name) / f"device-{index}"
            export_package(candidate(base, recipe, index), base, identity, images, package, quiet, plan, templates)
            sign_package(package, signing)
            if index == 0:
                first = time.perf_counter()
            size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
            shutil.rmtree(package)
            if (index + 1) % tenth == 0:
                rows.append({"devices": index + 1, "seconds": time.perf_counter() - start, "peak_mib": peak_mib()})
        total = time.perf_counter() - start
    rate = (asked.devices - 1) / (total - (first - start)) if asked.devices > 1 else float("nan")
    converted = first - start
    print(f"{asked.devices} packages of {size / 1e6:.1f} MB in {total:.1f} s; the first, converted: {converted:.1f} s")
    print(f"From the second on: {rate:.2f} packages per second")
    for row in rows:
        print(f"  after {row['devices']:4.0f} devices: {row['seconds']:7.1f} s, peak memory {row['peak_mib']:.0f} MiB")
    results = {"bytes": size, "seconds": total, "first": first - start, "packages_per_second": rate, "rows": rows}
    write_record(asked.json, "export_fleet", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
