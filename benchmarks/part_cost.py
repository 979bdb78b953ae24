"""What each part of a recipe costs, against the plain recipe of the same network: to train, to run, and to keep.

Plain is cross-entropy without a key. Training is the factory's loop over a few batches of the shipped Fashion-MNIST
sample, augmentation in it, validation and checkpoints not; running is one image in torch, in onnxruntime and in the
Core ML evaluator (NumPy: what it takes says nothing of a phone, only what the part adds to the graph). All of them take
turns in one process; a ratio is the median over rounds, with the lowest and highest. Memory is the process's peak
during training above what it held before. The purifier runs on a server; its row is one image of a batch, purified and
classified. Run alone::

    python -m benchmarks.part_cost --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.export_time import memory_of, size_of
from benchmarks.rounds import Ratio, Spent, base_and_sample, interleaved, seconds, table, wall_ratio, write_record
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from exporters.to_coreml import export_coreml
from exporters.to_onnx import export_onnx
from factory.adaptation import adapt
from factory.base import Base, build_network
from factory.classifier import ImageClassifier
from factory.data import Split, Splits
from factory.decoys import DecoyPool
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.keyed_transforms.key_ensemble import DeviceClassifier
from factory.progress import Progress
from factory.purifier.purify import purify
from factory.recipes.recipe import RecipeSettings
from factory.train import train
from keys.derive import DeviceKey, fixed_guess

PLAIN, UNDEFENDED = "plain: LoRA, no key", "plain: vgg2d, full"
PURIFIER = "purifier (on a server)"


@dataclass(frozen=True)
class Choice:
    """A recipe on a base, beside the plain recipe that it is compared with; ``keyed``: under a public key."""

    base: Base
    recipe: RecipeSettings
    plain: str
    keyed: bool = True


@dataclass(frozen=True, eq=False)
class Case:
    """One recipe's training, ready to be run once more, and its runtimes with the bytes of their files."""

    fit: Callable[[], float]
    runtimes: Mapping[str, Runtime]
    sizes: Mapping[str, int]


def choices(shipped: Base, seed: int) -> dict[str, Choice]:
    """Every part by itself, over the plain recipe of the network that it needs."""
    wide = 2 * shipped.patch_size
    on_vit: dict[str, dict[str, object]] = {
        "block shuffle, folded": {},
        "block shuffle, in the graph": {"block_size": wide},
        "bit flip, folded": {"transform": {"kind": "bit-flip"}},
        "format-preserving": {"transform": {"kind": "format-preserving"}},
        "full fine-tuning": {"adaptation": "full"},
        "patch embedding and head": {"adaptation": "patch-embedding-head"},
        "prototype conformity, softmax": {"objective": {"kind": "prototype-conformity"}},
        "prototype conformity, nearest prototype": {
            "objective": {"kind": "prototype-conformity", "inference": "nearest-prototype"},
        },
        "adversarial training, PGD of 10 steps": {"adversarial": {"kind": "pgd"}},
        "adversarial training, free, half a batch": {"adversarial": {"kind": "free"}},
        "adversarial training, one step, half a batch": {"adversarial": {"kind": "pgd", "steps": 1, "share": 0.5}},
        "distillation": {"objective": {"kind": "distillation"}},
        "curriculum, 4 sub-batches": {"curriculum": {"kind": "syllabus"}},
        "decoys, 0.4 of a batch": {"decoys": {}},
        "2 keys, average": {"keys": {"count": 2, "combine": "average"}},
        "2 keys, one chosen": {"keys": {"count": 2, "combine": "random"}},
    }  # fmt: skip
    flat, volumes = (_volume_base(shipped, name, seed) for name in ("vgg2d", "vgg3d"))
    made = {PLAIN: Choice(shipped, _recipe({}), PLAIN, keyed=False)}
    made |= {name: Choice(shipped, _recipe(values), PLAIN) for name, values in on_vit.items()}
    made[UNDEFENDED] = Choice(flat, _recipe({"adaptation": "full"}), UNDEFENDED, keyed=False)
    for order in ("raster", "key", "entropy", "mutual-information"):
        values = {
            "adaptation": "full", "transform": {"kind": "volumize", "order": order, "patch_size": wide},
            "objective": {"kind": "patch-aggregate"},
        }  # fmt: skip
        made[f"vgg3d, order {order}"] = Choice(volumes, _recipe(values), UNDEFENDED)
    return made


def _recipe(values: dict[str, Any]) -> RecipeSettings:
    return RecipeSettings.model_validate(values)


def _volume_base(shipped: Base, name: str, seed: int) -> Base:
    known = shipped.architecture
    arguments: dict[str, Any] = {"in_chans": known.contract.channels, "img_size": known.contract.height}
    if name == "vgg3d":
        arguments["patch_size"] = 2 * shipped.patch_size
    architecture = replace(known, name=name, arguments=arguments)
    return Base(architecture, build_network(architecture, seed=seed))


def case_of(choice: Choice, splits: Splits, batch_size: int, seed: int, folder: Path) -> Case:
    """The model trained a little, baked and exported."""
    base, recipe = choice.base, choice.recipe
    key = fixed_guess("part-cost") if choice.keyed else None
    members = [key] if recipe.keys is None else recipe.keys.member_keys(key)
    fits = [
        trainable(base, recipe, member, splits, batch_size, seed, folder / str(place))
        for place, member in enumerate(members)
    ]

    def fit() -> float:
        return sum(work() for _, work in fits)

    made: DeviceClassifier = fits[0][0]
    if recipe.keys is not None:
        made = recipe.keys.build([model for model, _ in fits], key, base.architecture.contract.shape)
    baked = bake(made.eval())
    contract, labels = base.architecture.contract, base.architecture.labels
    onnx, coreml = folder / "model.onnx", folder / "model.mlpackage"
    export_onnx(baked, onnx, contract, labels)
    export_coreml(baked, coreml, contract, labels)
    runtimes = {"torch": TorchRuntime(baked), "onnx": OnnxRuntime(onnx, threads=1), "coreml": CoreMLEvaluator(coreml)}
    return Case(fit, runtimes, {"onnx": onnx.stat().st_size, "coreml": size_of(coreml)})


def trainable(
    base: Base, recipe: RecipeSettings, key: DeviceKey | None, splits: Splits, batch_size: int, seed: int, folder: Path
) -> tuple[ImageClassifier, Callable[[], float]]:
    """A model, and what trains it over all of the training images once, and gives the seconds of its steps."""
    torch.manual_seed(seed)
    architecture = base.architecture
    transform = keyed_transform(base, recipe, key)
    model = ImageClassifier(adapt(base.network, recipe), architecture.mean, architecture.std, transform)
    classes, smoothing = len(splits.labels), recipe.training.label_smoothing
    objective = recipe.loss(model.network, classes, smoothing, base.network)
    images, labels = splits.train.images, splits.train.labels
    decoys = None if recipe.decoys is None else DecoyPool(images, labels, recipe.decoys.share)
    settings = recipe.training.model_copy(update={"epochs": 1, "batch_size": batch_size, "learning_rate": 1e-5})
    curriculum = None if recipe.curriculum is None else recipe.curriculum.build()
    runs = itertools.count()

    def fit() -> float:
        (epoch,) = train(
            model, splits.train, splits.validation, settings, seed=seed, name="part-cost",
            checkpoint=folder / f"{next(runs)}.safetensors", progress=Progress(quiet=True), objective=objective,
            curriculum=curriculum, decoys=decoys,
        )  # fmt: skip
        return len(images) / epoch.images_per_second

    folder.mkdir(parents=True)
    fit()  # which gives the objective what it learns, and the optimiser's libraries what they prepare once
    recipe.objective.attach(model.network, objective.learned())
    return model, fit


def trainings(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[Spent]]:
    """Every training once in each round, every other round backwards; each gives the seconds that count."""
    spent: dict[str, list[Spent]] = {name: [] for name in cases}
    for index in range(rounds):
        for name in list(cases) if index % 2 == 0 else reversed(list(cases)):
            before = time.process_time()
            spent[name].append(Spent(cases[name](), time.process_time() - before))
    return spent


def repeated(runtime: Runtime, image: np.ndarray, repeats: int) -> Callable[[], None]:
    """So many answers to one image."""

    def work() -> None:
        for _ in range(repeats):
            runtime.logits(image)

    return work


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="shipped", help="or the path of another checkpoint of the same ten classes")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--steps", type=int, default=4, help="batches in a round's training")
    made.add_argument("--repeats", type=int, default=10, help="images in a round")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--only", nargs="+", help="words: only the recipes with one of them, and the plain ones")
    made.add_argument("--threads", type=int, default=1, help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    base, _, whole = base_and_sample(asked.base)
    count = asked.steps * asked.batch_size
    splits = Splits(
        whole.name, _first(whole.train, count), _first(whole.validation, 16), _first(whole.test, 16), whole.labels
    )
    chosen = {
        name: choice for name, choice in choices(base, asked.seed).items()
        if asked.only is None or name == choice.plain or any(word in name for word in asked.only)
    }  # fmt: skip
    image = splits.test.images[:1].numpy().astype(np.float32) / 255
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as folder:
        cases = {
            name: case_of(choice, splits, asked.batch_size, asked.seed, Path(folder) / str(place))
            for place, (name, choice) in enumerate(chosen.items())
        }
        spent: dict[str, dict[str, list[Spent]]] = {}
        spent["train"] = trainings({name: case.fit for name, case in cases.items()}, asked.rounds)
        for runtime in ("torch", "onnx", "coreml"):
            work = {name: repeated(case.runtimes[runtime], image, asked.repeats) for name, case in cases.items()}
            if runtime == "onnx":
                work[PURIFIER] = purification(cases[PLAIN], splits)
            interleaved(work, 1)
            spent[runtime], _ = interleaved(work, asked.rounds)
        memory = {name: memory_of(case.fit) for name, case in cases.items()}
    results: dict[str, dict[str, Any]] = {
        name: {
            "train": _over(spent["train"], name, choice.plain),
            "milliseconds_per_step": 1000 * seconds(spent["train"][name]) / asked.steps, "memory MiB": memory[name],
            **{runtime: _over(spent[runtime], name, choice.plain) for runtime in ("torch", "onnx", "coreml")},
            "onnx_milliseconds": 1000 * seconds(spent["onnx"][name]) / asked.repeats,
            "onnx_bytes": cases[name].sizes["onnx"], "coreml_bytes": cases[name].sizes["coreml"],
            "spent": {kind: times[name] for kind, times in spent.items()},
        }
        for name, choice in chosen.items()
    }  # fmt: skip
    purified = wall_ratio(spent["onnx"][PURIFIER], spent["onnx"][PLAIN])
    images = len(splits.test.images)
    per_image = Ratio(*(value * asked.repeats / images for value in (purified.median, purified.low, purified.high)))
    rows = [
        [
            name, str(found["train"]), f"{found['memory MiB']:.0f}", str(found["torch"]), str(found["onnx"]),
            str(found["coreml"]), f"{found['onnx_bytes'] / 1e6:.2f}", f"{found['coreml_bytes'] / 1e6:.2f}",
        ]
        for name, found in results.items()
    ]  # fmt: skip
    rows.append([PURIFIER, "", "", "", str(per_image), "", "", ""])
    headings = [
        "recipe", "training / plain", "memory MiB", "torch / plain", "onnxruntime / plain", "Core ML evaluator / plain",
        "ONNX MB", "Core ML MB",
    ]  # fmt: skip
    print(table(headings, rows))
    write_record(asked.json, "part_cost", asked, results | {PURIFIER: {"onnx": per_image}})
    return 0


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def _over(spent: Mapping[str, list[Spent]], name: str, plain: str) -> Ratio:
    return wall_ratio(spent[name], spent[plain])


def purification(plain: Case, splits: Splits) -> Callable[[], None]:
    """Purify all test images in one batch, behind the plain model."""
    images = splits.test.images.float() / 255

    def classify(asked: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(plain.runtimes["onnx"].logits(asked.numpy()))

    def work() -> None:
        purify(images, classify)

    return work


if __name__ == "__main__":
    sys.exit(main())
