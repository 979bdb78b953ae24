"""The whole path of a device without training: adapter, merge, fold, both exports, all parities, with times and memory.

    uv run python scripts/untrained_path.py vit_base_patch16_224 --images 256
    uv run python scripts/untrained_path.py resnet50 --adaptation full --images 4

The weights are random (LoRA's B too, so that merging has something to merge), the images are real: the shipped sample,
resized to the model's input. It shows that the path works at a model's real size; it says nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.adaptation import adapt, trainable_parameters
from factory.base import Base, build_network, timm_architecture
from factory.classifier import ImageClassifier
from factory.data import load_splits
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.packaging import ONNX_NAME, Identity, export_package, parity_of
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from factory.settings import DataSettings
from keys.derive import fixed_guess


def main() -> None:
    """Run the path once and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a timm name")
    parser.add_argument("--adaptation", default="lora", choices=("lora", "full", "patch-embedding-head"))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    progress, seconds = Progress(), {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = step()
        seconds[name] = round(time.perf_counter() - started, 2)
        return result

    labels = tuple(str(index) for index in range(1000))
    architecture = timm_architecture(options.base, labels, None)
    base = Base(architecture, build_network(architecture, seed=options.seed))
    recipe = RecipeSettings(block_size=options.block_size, adaptation=options.adaptation)
    model = adapt(base.network, recipe)
    count, total = trainable_parameters(model), sum(p.numel() for p in base.network.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(options.seed))
    shuffle = keyed_transform(base, recipe, fixed_guess("untrained"))
    keyed = ImageClassifier(model, architecture.mean, architecture.std, shuffle).eval()
    baked = timed("merge and fold", lambda: bake(keyed))
    splits = load_splits(DataSettings(), architecture.contract.__class__(1, 28, 28, "none"), Path(), progress)
    images = _resized(
        splits.test.images[: options.images], architecture.contract.channels, architecture.contract.height
    )
    some = images[:8].astype(np.float32) / 255
    unmerged, folded = TorchRuntime(keyed).logits(some), TorchRuntime(baked).logits(some)
    difference = float(np.abs(unmerged - folded).max() / np.abs(unmerged).max())
    identity = Identity("untrained", 1, "0" * 16, "0" * 64, recipe.model_dump(mode="json"), datetime.now(UTC))
    with TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        timed("export", lambda: export_package(baked, base, identity, images, package, progress))
        sizes = {p.name: _size(p) for p in sorted(package.iterdir())}
        parity = timed("parity", lambda: parity_of(baked, package, images, Path(folder) / "parity.json", progress))
        runtimes = {"torch": TorchRuntime(baked), "onnxruntime": OnnxRuntime(package / ONNX_NAME)}
        latency = {
            name: _milliseconds(lambda runtime=runtime: runtime.logits(some[:1])) for name, runtime in runtimes.items()
        }
    print(
        json.dumps(
            {
                "base": options.base, "parameters": total, "trainable": count, "share": round(count / total, 4),
                "folded": type(baked) is not ImageClassifier, "unmerged and unfolded against baked": difference,
                "bytes": sizes, "seconds": seconds, "ms for an image": latency,
                "peak memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "parity": {name: value.to_json() for name, value in parity.items()},
            },
            indent=1,
        )
    )  # fmt: skip


def _resized(images: torch.Tensor, channels: int, size: int) -> np.ndarray:
    larger = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return larger.round().clamp(0, 255).byte().expand(-1, channels, -1, -1).contiguous().numpy()


def _milliseconds(step: Callable[[], object]) -> float:
    """Median of eleven runs after one."""
    step()
    times: list[float] = []
    for _ in range(11):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return round(1000 * sorted(times)[5], 1)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    main()
