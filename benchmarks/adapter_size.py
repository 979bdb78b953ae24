"""How large a LoRA-only package is beside the full one, and how close base and adapter come to it.

The model has random weights and random updates (r = 16, or as a preset says): sizes do not depend on training, and the
updates that are compared are not zero. Every size is of real packages: the base's and the full one are exported, the
adapter package is made from them, and the Core ML packages are assembled and compared byte for byte. ViT-B/16 needs
3 GiB of disk and minutes. Run::

    python -m benchmarks.adapter_size --classes 10 1000 --json FILE
    python -m benchmarks.adapter_size --classes 1000 --preset hardened
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.adapter.adapter_file import ADAPTER_NAME, device_tensors, read_adapter
from exporters.adapter.pair import BASE_ONNX, assemble_coreml, open_base_of
from exporters.formats import FORMATS
from exporters.onnx_file import stored_tensors
from exporters.package import digest_folder, open_package, sign_package
from factory.adaptation import adapt, trainable_parameters
from factory.adapter_package import export_adapter_package, export_base_package, sizes_of
from factory.base import Base, build_network, timm_architecture
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.packaging import Identity, export_package
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from factory.settings import preset_settings, presets
from keys.derive import fixed_guess
from keys.errors import KeyfoundryError
from keys.signing import SigningKey

CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)
FLEET = "0" * 16


def measured(name: str, classes: int, recipe: RecipeSettings) -> dict[str, Any]:
    """The packages of one device of a base with ``classes`` classes, made by ``recipe`` and put together."""
    architecture = timm_architecture(name, tuple(f"class {index}" for index in range(classes)), None)
    base = Base(architecture, build_network(architecture))
    model = _model(base, recipe)
    quiet, key = Progress(quiet=True), SigningKey(bytes(32))
    shape = (8, *architecture.contract.shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as place:
        shared, full, adapter = (Path(place) / part for part in ("base", "full", "adapter"))
        export_base_package(base, recipe, FLEET, images, shared, quiet, created=CREATED)
        identity = Identity("device-1", 1, FLEET, "0" * 64, recipe.model_dump(mode="json"), CREATED)
        whole = export_package(bake(model), base, identity, images, full, quiet)
        started = time.perf_counter()
        manifest = export_adapter_package(model, base, recipe, shared, full, adapter, quiet)
        made = time.perf_counter() - started
        sign_package(shared, key)
        sign_package(adapter, key)
        opened = open_package(adapter, key.public_bytes)
        below = open_base_of(opened, shared, key.public_bytes)
        started = time.perf_counter()
        folders = assemble_coreml(opened, below, Path(place) / "assembled")
        assembled = time.perf_counter() - started
        equal = all(digest_folder(folder) == digest_folder(full / folder.name) for folder in folders)
        data = (shared / BASE_ONNX).read_bytes()
        stored = {tensor.name: tensor.read(data) for tensor in stored_tensors(data)}
        tensors = read_adapter((adapter / ADAPTER_NAME).read_bytes())
        started = time.perf_counter()
        device_tensors(stored, tensors)
        merging = time.perf_counter() - started
    sizes = sizes_of(whole, manifest)
    parity: Any = manifest.evidence["parity_with_full_package"]
    onnx = whole.files[FORMATS["onnx-fp32"].path].size
    return {
        "model": name, "classes": classes, "recipe": recipe.model_dump(mode="json"),
        "trained_parameters": trainable_parameters(model.network), "full_bytes": sizes.full, "full_onnx_bytes": onnx,
        "adapter_bytes": sizes.adapter, "adapter_file_bytes": manifest.files[ADAPTER_NAME].size,
        "coreml_delta_bytes": sizes.coreml_delta, "share": sizes.share, "share_of_onnx_alone": sizes.adapter / onnx,
        "difference_of_largest_logit": parity["max_relative_difference"], "coreml_bytes_equal": equal,
        "seconds_exporting_adapter": made, "seconds_assembling": assembled, "seconds_merging": merging,
    }  # fmt: skip


def _model(base: Base, recipe: RecipeSettings) -> ImageClassifier:
    torch.manual_seed(0)
    vit = adapt(base.network, recipe)
    for parameter in vit.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
    shuffle = keyed_transform(base, recipe, fixed_guess("size"))
    return ImageClassifier(vit, base.architecture.mean, base.architecture.std, shuffle).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per number of classes; exit with 1 if a package is over 3 % or Core ML bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm name")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--rank", type=int, default=16)
    chosen.add_argument("--preset", choices=presets(), help="an embedded fleet file, for its recipe instead of a rank")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    recipe = RecipeSettings(rank=options.rank, alpha=float(options.rank))
    if options.preset is not None:
        recipe = preset_settings(options.preset).recipe
    rows: list[dict[str, Any]] = []
    for classes in options.classes:
        try:
            row = measured(options.model, classes, recipe)
        except KeyfoundryError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        rows.append(row)
        print(
            f"{row['model']}, {classes} classes, r = {recipe.rank}, {row['trained_parameters']:,} parameters trained: "
            f"full {row['full_bytes']:,} bytes, adapter package "
            f"{row['adapter_bytes']:,} ({row['share']:.2%}; {row['share_of_onnx_alone']:.2%} of the full ONNX file "
            f"alone), Core ML delta {row['coreml_delta_bytes']:,}; logits differ by "
            f"{row['difference_of_largest_logit']:.1e} of the largest; Core ML bytes equal: "
            f"{row['coreml_bytes_equal']}; merging {row['seconds_merging']:.1f} s, "
            f"assembling {row['seconds_assembling']:.1f} s",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["share"] <= 0.03 and row["coreml_bytes_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
