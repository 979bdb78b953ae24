"""Table II here: what full fine-tuning, LoRA, and patch embedding with head cost to train and to keep.

Trainable parameters, seconds of a training step and of an epoch, peak memory of a step, and bytes of what a device adds
to the base. The adaptations take turns in every round, each with a model, an optimiser and images of its own; a round
is some steps as the factory makes them (AdamW, clipped gradients, bf16 where it pays). An epoch is its number of steps
times the median step: augmentation and validation, which cost every adaptation the same, are not in it. Memory is the
process's peak during one step above what it held before, with the optimiser's state already there. Run::

    python -m benchmarks.training_cost --json FILE
    python -m benchmarks.training_cost --base vit_base_patch16_224 --classes 1000 --batch-size 8 --steps 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from benchmarks.export_time import memory_of, size_of
from benchmarks.rounds import cpu_ratio, interleaved, seconds, table, wall_ratio, write_record
from factory.adaptation import adapt, save_adapter, trainable_parameters
from factory.base import Base, build_network, load_base, read_architecture, timm_architecture
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.objective import CrossEntropy
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.settings import BaseSettings
from factory.train import uses_bf16
from keys.derive import fixed_guess

ADAPTATIONS = tuple(str(name) for name in get_args(RecipeSettings.model_fields["adaptation"].annotation))
REFERENCE = "full"


@dataclass(frozen=True, eq=False)
class Case:
    """One adaptation, ready to be trained; ``step`` makes one step of the optimiser."""

    model: ImageClassifier
    step: Callable[[], None]

    def several(self, steps: int) -> Callable[[], None]:
        """What makes so many steps."""

        def work() -> None:
            for _ in range(steps):
                self.step()

        return work


def base_of(name: str, classes: int, size: int | None, seed: int) -> Base:
    """The shipped base or another checkpoint, or a timm model with random weights and so many classes."""
    if name == "shipped" or Path(name).is_file():
        settings = BaseSettings(name=name)
        return load_base(settings, read_architecture(settings).labels, seed)
    architecture = timm_architecture(name, tuple(f"class-{index}" for index in range(classes)), size)
    return Base(architecture, build_network(architecture, seed=seed))


def case_of(base: Base, adaptation: str, training: TrainingSettings, seed: int) -> Case:
    """A keyed model, its optimiser, and a step on one batch of random images, the same for every adaptation."""
    recipe = RecipeSettings.model_validate({"adaptation": adaptation})
    torch.manual_seed(seed)
    network = adapt(base.network, recipe)
    transform = keyed_transform(base, recipe, fixed_guess("training-cost"))
    model = ImageClassifier(network, base.architecture.mean, base.architecture.std, transform).train()
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(training.batch_size, *base.architecture.contract.shape, generator=generator)
    labels = torch.randint(len(base.architecture.labels), (training.batch_size,), generator=generator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=training.weight_decay)
    objective, bf16 = CrossEntropy(), uses_bf16(training.precision, images.device)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(model, images, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Case(model, step)


def kept_bytes(case: Case) -> int:
    """Bytes of the adapter's folder: what is kept of this device beside the base."""
    with tempfile.TemporaryDirectory(prefix="keyfoundry-") as folder:
        save_adapter(case.model.network, Path(folder) / "adapter")
        return size_of(Path(folder) / "adapter")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="shipped", help="or a checkpoint, or a timm name; its weights are random then")
    made.add_argument("--classes", type=int, default=10, help="of a timm model")
    made.add_argument("--image-size", type=int)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--images", type=int, default=60_000, help="of an epoch")
    made.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=5, help="in each round")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    base = base_of(asked.base, asked.classes, asked.image_size, asked.seed)
    training = TrainingSettings(batch_size=asked.batch_size, precision=asked.precision)
    cases = {name: case_of(base, name, training, asked.seed) for name in ADAPTATIONS}
    for case in cases.values():
        case.step()  # the optimiser's state, and what libraries prepare once

    spent, _ = interleaved({name: case.several(asked.steps) for name, case in cases.items()}, asked.rounds)
    whole = sum(parameter.numel() for parameter in base.network.parameters())
    results: dict[str, dict[str, Any]] = {
        name: {
            "trainable_parameters": trainable_parameters(case.model),
            "share": trainable_parameters(case.model) / whole,
            "seconds_per_step": seconds(spent[name]) / asked.steps,
            "seconds_per_epoch": seconds(spent[name]) / asked.steps * -(-asked.images // asked.batch_size),
            "time over full": wall_ratio(spent[name], spent[REFERENCE]),
            "cpu time over full": cpu_ratio(spent[name], spent[REFERENCE]),
            "memory MiB": memory_of(case.step),
            "kept_bytes": kept_bytes(case),
            "spent": spent[name],
        }
        for name, case in cases.items()
    }
    print(f"{base.architecture.name}: {whole:,} parameters, batches of {asked.batch_size}\n")
    rows = [
        [
            name, f"{found['trainable_parameters']:,} ({found['share']:.2%})", f"{found['seconds_per_step']:.3f}",
            f"{found['seconds_per_epoch']:.0f}", str(found["time over full"]), str(found["cpu time over full"]),
            f"{found['memory MiB']:.0f}", f"{found['kept_bytes'] / 1e6:.2f}",
        ]
        for name, found in results.items()
    ]  # fmt: skip
    headings = [
        "adaptation", "trained (share)", "s a step", f"s an epoch of {asked.images:,}", "time / full",
        "CPU time / full", "memory MiB", "kept MB",
    ]  # fmt: skip
    print(table(headings, rows))
    write_record(asked.json, "training_cost", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
