"""What one more device costs to export, against copying its bytes and against a full conversion.

For each format by itself: *copy* copies a finished package's files and flushes them to disk (fsync); *marginal* writes
a device's package from the fleet's template, with digests and manifest, flushed as well; *full* converts the same
module anew and writes the same. The three take turns, on a ViT with random weights under a key of its own. Golden
logits, which need a forward pass and cost every device the same, are not in it. Memory is the process's peak while it
writes one package, above what it held before (the models among it). Run::

    python -m benchmarks.export_time --json FILE
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.rounds import interleaved, seconds, table, wall_ratio, write_record
from exporters.export import ExportPlan, Templates, export
from exporters.manifest import Manifest, utc_text
from exporters.package import write_package
from factory.base import Base, build_network, timm_architecture
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.packaging import tool_versions
from factory.recipes.recipe import RecipeSettings
from keys.derive import fixed_guess
from keys.files import folder_being_written, sync_folder

FORMATS = ("onnx-fp32", "onnx-fp16", "onnx-int8", "coreml-fp32", "coreml-fp16", "coreml-int8")
KINDS = ("copy", "marginal", "full")
CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)


def device(name: str, base_name: str, size: int | None, seed: int) -> tuple[Base, nn.Module]:
    """A baked model under the public key that is guessed for ``name``, with random weights from ``seed``."""
    architecture = timm_architecture(base_name, tuple(f"class-{index}" for index in range(10)), size)
    base = Base(architecture, build_network(architecture, seed=seed))
    shuffle = keyed_transform(base, RecipeSettings(), fixed_guess(name))
    return base, bake(ImageClassifier(base.network, architecture.mean, architecture.std, shuffle))


def write(module: nn.Module, plan: ExportPlan, package: Path, templates: Templates | None) -> None:
    """An unsigned package without golden images: what is measured."""
    with folder_being_written(package) as folder:
        digests = export(module, folder, plan, templates).digests
        manifest = Manifest(
            device_id=package.name, generation=1, fleet_id="0" * 16, base_digest="0" * 64, adapter_digest="0" * 64,
            recipe={}, labels=plan.labels, input=plan.contract, files={}, evidence={}, created=utc_text(CREATED),
            tools=tool_versions(), formats=plan.entries(),
        )  # fmt: skip
        write_package(folder, manifest, digests)


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files and flush each of them, and the folders, to disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir()), target.parent):
        sync_folder(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory_of(work: Callable[[], object]) -> float:
    """MiB of resident memory that ``work`` needed on top of what there was before; NaN where Linux does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the work would reuse it unseen
    reset.write_text("5")  # the peak begins anew
    before = _status(status, "VmRSS")
    work()
    return _status(status, "VmHWM") - before


def _status(status: Path, name: str) -> float:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="vit_base_patch16_224", help="a timm name; its weights are random")
    made.add_argument("--image-size", type=int)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    base, second = device("second", asked.base, asked.image_size, asked.seed + 1)
    with tempfile.TemporaryDirectory(prefix="keyfoundry-", dir=asked.folder) as name:
        folder = Path(name)
        _, first = device("first", asked.base, asked.image_size, asked.seed)
        results = {one: measure(one, base, first, second, folder / one, asked) for one in asked.formats}
    rows = [
        [
            one, f"{found['bytes'] / 1e6:.1f}", *(f"{found['seconds'][kind]:.2f}" for kind in KINDS),
            str(found["marginal over copy"]), str(found["full over marginal"]), str(found["full over copy"]),
            *(f"{found['memory MiB'][kind]:.0f}" for kind in KINDS[1:]),
        ]
        for one, found in results.items()
    ]  # fmt: skip
    headings = [
        "format", "MB", "copy s", "marginal s", "full s", "marginal / copy", "full / marginal", "full / copy",
        "memory MiB, marginal", "memory MiB, full",
    ]  # fmt: skip
    print(table(headings, rows))
    write_record(asked.json, "export_time", asked, results)
    return 0


def measure(
    one: str, base: Base, first: nn.Module, second: nn.Module, folder: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """One format: the first device leaves the template, then copy, marginal and full take turns on the second."""
    plan = ExportPlan(base.architecture.contract, base.architecture.labels, (one,))
    templates = Templates(folder / "templates", {}, _unexpected)
    write(first, plan, folder / "first", templates)
    write(second, plan, folder / "second", templates)
    # Each writes where nothing is: who first deletes a file reuses its memory, which is faster.
    targets = (folder / f"package-{number}" for number in itertools.count())
    spent, _ = interleaved(
        {
            "copy": lambda: copy(folder / "second", next(targets)),
            "marginal": lambda: write(second, plan, next(targets), templates),
            "full": lambda: write(second, plan, next(targets), None),
        },
        asked.rounds,
    )
    write(second, plan, folder / "marginal", templates)
    write(second, plan, folder / "full", None)
    same = all(
        (folder / "marginal" / path.relative_to(folder / "full")).read_bytes() == path.read_bytes()
        for path in (folder / "full").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
    if not same:
        raise SystemExit(f"{one}: the patched package differs from the converted one")
    found = size_of(folder / "second")
    memory = {
        "marginal": memory_of(lambda: write(second, plan, next(targets), templates)),
        "full": memory_of(lambda: write(second, plan, next(targets), None)),
    }
    shutil.rmtree(folder)
    return {
        "bytes": found, "seconds": {name: seconds(times) for name, times in spent.items()},
        "marginal over copy": wall_ratio(spent["marginal"], spent["copy"]),
        "full over marginal": wall_ratio(spent["full"], spent["marginal"]),
        "full over copy": wall_ratio(spent["full"], spent["copy"]), "memory MiB": memory, "rounds": spent,
    }  # fmt: skip


def _unexpected(sentence: str) -> None:
    raise SystemExit(f"The template was not used: {sentence}")


if __name__ == "__main__":
    sys.exit(main())
