"""What a key, and quantisation, do to the time of one image in onnxruntime.

The same ViT with random weights, exported plain, with the shuffle folded into the patch embedding, with the shuffle
kept in the graph (blocks larger than patches cannot be folded), with plain weights in float16, and in int8. One image
at a time, all sessions in one process; in each round every session runs once, in random order. Printed is the median
over rounds of the ratio to the plain model in the same round, with its 95 % bootstrap interval, and how close the
logits of the quantised files are. Run::

    python -m benchmarks.latency --json FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rounds import table, write_record
from exporters.onnx_precision import to_fp16, to_int8, to_int8_static
from exporters.run_onnx import OnnxRuntime
from exporters.to_onnx import export_onnx
from factory.base import Base, build_network, timm_architecture
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.recipes.recipe import RecipeSettings
from keys.derive import fixed_guess

PLAIN, FOLDED, GATHERED = "plain", "folded", "gathered"
FP16, INT8, STATIC = "plain, fp16 weights", "plain, int8", "plain, int8 static"
_CALIBRATION, _COMPARED, _RESAMPLED = 32, 16, 2000


def files(base_name: str, size: int | None, classes: int, seed: int) -> tuple[dict[str, bytes], tuple[int, int, int]]:
    """The ONNX files, by what they are, and the shape of an image."""
    architecture = timm_architecture(base_name, tuple(f"class-{index}" for index in range(classes)), size)
    base = Base(architecture, build_network(architecture, seed=seed))
    key, made = fixed_guess("latency"), {}
    for name, block_size in ((PLAIN, None), (FOLDED, base.patch_size), (GATHERED, 2 * base.patch_size)):
        shuffle = None if block_size is None else keyed_transform(base, RecipeSettings(block_size=block_size), key)
        baked = bake(ImageClassifier(base.network, architecture.mean, architecture.std, shuffle))
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(baked, Path(folder) / "model.onnx", architecture.contract, architecture.labels)
            made[name] = (Path(folder) / "model.onnx").read_bytes()
    shape = architecture.contract.shape
    calibration = np.random.default_rng(seed).random((_CALIBRATION, *shape), np.float32)
    made |= {
        FP16: to_fp16(made[PLAIN]), INT8: to_int8(made[PLAIN]), STATIC: to_int8_static(made[PLAIN], calibration),
    }  # fmt: skip
    return made, shape


def interval(ratios: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median."""
    medians = np.median(generator.choice(ratios, (_RESAMPLED, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="vit_base_patch16_224", help="a timm name; its weights are random")
    made.add_argument("--image-size", type=int)
    made.add_argument("--classes", type=int, default=1000)
    made.add_argument("--rounds", type=int, default=200)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    generator = np.random.default_rng(asked.seed)
    models, shape = files(asked.base, asked.image_size, asked.classes, asked.seed)
    runtimes = {name: OnnxRuntime(data, threads=asked.threads) for name, data in models.items()}
    compared = generator.random((_COMPARED, *shape), np.float32)
    logits = {name: runtime.logits(compared).astype(np.float64) for name, runtime in runtimes.items()}
    one = compared[:1]
    spent: dict[str, list[float]] = {name: [] for name in runtimes}
    for index in range(asked.rounds + 3):
        for name in generator.permutation(list(runtimes)):
            start = time.perf_counter()
            runtimes[name].logits(one)
            if index >= 3:  # the first runs also allocate
                spent[name].append(time.perf_counter() - start)
    results: dict[str, Any] = {}
    for name, times in spent.items():
        ratios = np.array(times) / np.array(spent[PLAIN])
        low, high = interval(ratios, generator)
        a, b = logits[PLAIN], logits[name]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        quantised = name in (FP16, INT8, STATIC)
        results[name] = {
            "median_ms": float(np.median(times)) * 1e3, "ratio": float(np.median(ratios)), "interval": [low, high],
            "faster": float(1 / np.median(ratios)), "bytes": len(models[name]),
            "seconds": times, "cosines": cosines.tolist() if quantised else [],
        }  # fmt: skip
    rows = [
        [
            name, f"{found['median_ms']:.1f}", "{:.3f} ({:.3f}–{:.3f})".format(found["ratio"], *found["interval"]),
            f"{found['faster']:.2f}", _shown(found["cosines"]),
            f"{found['bytes'] / 1e6:.1f}",
        ]
        for name, found in results.items()
    ]  # fmt: skip
    headings = ["model", "median ms", "of plain (95 %)", "times as fast", "cosine of logits: smallest, median", "MB"]
    print(table(headings, rows))
    write_record(asked.json, "latency", asked, results)
    return 0


def _shown(cosines: list[float]) -> str:
    return f"{min(cosines):.5f}, {np.median(cosines):.5f}" if cosines else ""


if __name__ == "__main__":
    sys.exit(main())
