"""What each way to key a device costs in onnxruntime: bytes, and one image's latency against one folded shuffle.

Every device is the base with untrained LoRA under public keys, baked and exported as the factory does it. They take
turns; a round is ``--repeats`` single images each. Run alone, for a busy machine spreads these short times widely::

    python -m benchmarks.keyed_latency --json FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.rounds import base_and_sample, cpu_ratio, interleaved, seconds, table, wall_ratio, write_record
from exporters.run_onnx import OnnxRuntime
from exporters.to_onnx import export_onnx
from factory.adaptation import adapt
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.keyed_transforms.key_ensemble import DeviceClassifier
from factory.packaging import ONNX_NAME
from factory.recipes.recipe import RecipeSettings
from keys.derive import DeviceKey, fixed_guess

REFERENCE = "one key, shuffle, folded"


def recipes(base: Base, keys: list[int]) -> dict[str, RecipeSettings]:
    """What is compared; blocks of twice the patch stay in the graph."""
    wide = 2 * base.patch_size
    chosen: dict[str, dict[str, object]] = {
        REFERENCE: {},
        "one key, shuffle, gathered": {"block_size": wide},
        "one key, bit flip, folded": {"transform": {"kind": "bit-flip"}},
        "one key, bit flip and shuffle, in the graph": {
            "block_size": wide, "transform": {"kind": "bit-flip", "shuffle": True},
        },
        "one key, format-preserving": {"transform": {"kind": "format-preserving"}},
    }  # fmt: skip
    for count in keys:
        for combine in ("average", "random"):
            chosen[f"{count} keys, {combine}"] = {"keys": {"count": count, "combine": combine}}
    return {name: RecipeSettings.model_validate(values) for name, values in chosen.items()}


def device(base: Base, recipe: RecipeSettings, seed: int) -> nn.Module:
    """A baked device of this recipe whose updates are zero: no time depends on their values."""
    architecture, key = base.architecture, fixed_guess("keyed-latency")
    torch.manual_seed(seed)

    def member(member_key: DeviceKey | None) -> ImageClassifier:
        transform = keyed_transform(base, recipe, member_key)
        return ImageClassifier(adapt(base.network, recipe), architecture.mean, architecture.std, transform).eval()

    model: DeviceClassifier = member(key)
    if recipe.keys is not None:
        members = [member(member_key) for member_key in recipe.keys.member_keys(key)]
        model = recipe.keys.build(members, key, architecture.contract.shape).eval()
    return bake(model)


def repeated(runtime: OnnxRuntime, image: np.ndarray, repeats: int) -> Callable[[], None]:
    """So many answers to one image."""

    def work() -> None:
        for _ in range(repeats):
            runtime.logits(image)

    return work


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="shipped", help="or the path of another checkpoint of the same ten classes")
    made.add_argument("--keys", type=int, nargs="+", default=[2, 4], help="how many keys the ensembles have")
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument("--repeats", type=int, default=100, help="images in a round")
    made.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    base, _, splits = base_and_sample(asked.base)
    image = splits.test.images[:1].numpy().astype(np.float32) / 255
    cases: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as folder:
        for name, recipe in recipes(base, asked.keys).items():
            path = Path(folder) / ONNX_NAME
            export_onnx(device(base, recipe, asked.seed), path, base.architecture.contract, base.architecture.labels)
            sizes[name] = path.stat().st_size
            cases[name] = repeated(OnnxRuntime(path, threads=asked.threads), image, asked.repeats)
            cases[name]()
        spent, _ = interleaved(cases, asked.rounds)
    results: dict[str, dict[str, Any]] = {
        name: {
            "bytes": sizes[name], "bytes over one": sizes[name] / sizes[REFERENCE],
            "milliseconds": seconds(took) / asked.repeats * 1000, "spent": took,
            "time over one": wall_ratio(took, spent[REFERENCE]), "cpu time over one": cpu_ratio(took, spent[REFERENCE]),
        }
        for name, took in spent.items()
    }  # fmt: skip
    rows = [
        [
            name, f"{found['bytes'] / 1e6:.2f}", f"{found['bytes over one']:.2f}", f"{found['milliseconds']:.2f}",
            str(found["time over one"]), str(found["cpu time over one"]),
        ]
        for name, found in results.items()
    ]  # fmt: skip
    print(table(["device", "ONNX MB", "bytes / one key", "ms an image", "time / one key", "CPU time /"], rows))
    write_record(asked.json, "keyed_latency", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
