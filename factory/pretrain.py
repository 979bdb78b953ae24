"""Train a base, from scratch or on from another one, and write its checkpoint and model card."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from device_tests.evidence import Proportion
from factory.base import Architecture, Base, build_network, save_checkpoint
from factory.data import Splits
from factory.device_model import public_model
from factory.networks import embedding_convolution, patch_embedding, traits
from factory.progress import Progress
from factory.recipes.recipe import PARTS_OF_TRAINING, RecipeSettings, check_recipe
from factory.recipes.training import TrainingSettings
from factory.seeds import derive_seed
from factory.train import Epoch, accuracy, train
from factory.vits import KeyedVit
from keys.errors import InputError
from keys.files import write_atomic

OF_DEVICES = ("decoys", "keys", "attractors", "purifier")
"""Parts of a recipe that a base cannot have."""


@dataclass(frozen=True)
class Pretrained:
    """A new base with its history and its accuracy on validation and test images.

    ``start``: digest of the base that it went on from; None: random weights. ``parts``: those of the recipe that it was
    trained by, as in a fleet file.
    """

    base: Base
    start: str | None
    parts: dict[str, Any]
    history: list[Epoch]
    validation_accuracy: float
    test_accuracy: Proportion


def pretrain(
    start: Architecture | Base, splits: Splits, settings: TrainingSettings, *, seed: int, out: Path, progress: Progress,
    recipe: RecipeSettings | None = None,
) -> Pretrained:  # fmt: skip
    """Train ``start`` and write it to ``out`` (resumable beside it until then).

    An architecture begins with random weights: ViTs as :func:`initialise` says, other networks as timm has it; its
    normalisation statistics become those of the training images. A base goes on from its own weights and statistics; it
    is left as it is. ``recipe``: its transform, as without a key, its objective, adversarial training and curriculum.
    Raises InputError if the network lacks what they need, if the objective would have it answer by more than its own
    weights, or if the recipe has parts that only devices can have.
    """
    recipe = (recipe or RecipeSettings()).model_copy(update={"adaptation": "full"})
    for part in OF_DEVICES:
        if getattr(recipe, part) is not None:
            raise InputError(f"A base has no {part}: they are a device's; leave recipe.{part} out.")
    begun = start.digest if isinstance(start, Base) else None
    base = _copy(start) if isinstance(start, Base) else _at_random(start, splits, seed)
    network, name = base.network, base.architecture.name
    check_recipe(recipe, traits(network), f"base {name}")
    if recipe.objective.learns_from_base:
        raise InputError(
            f"A base has no other base to learn from; choose another objective than {recipe.objective.name}."
        )
    if recipe.objective.changes_network:
        raise InputError('A base answers by its own weights; give the objective inference = "softmax".')
    model = public_model(base, recipe)
    objective = recipe.loss(network, len(splits.labels), settings.label_smoothing, network)
    parts = _parts(recipe, transformed=model.transform is not None)
    made_from = [begun or repr(base.architecture), splits.digest, settings.model_dump(mode="json"), parts, seed]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    checkpoint = out.with_suffix(f".training-{digest[:16]}.safetensors")
    history = train(
        model, splits.train, splits.validation, settings, seed=seed, name="pre-train", checkpoint=checkpoint,
        progress=progress, objective=objective,
        curriculum=None if recipe.curriculum is None else recipe.curriculum.build(),
    )  # fmt: skip
    network.eval()
    test = accuracy(model, splits.test)
    result = Pretrained(
        base,
        begun,
        parts,
        history,
        history[-1].validation_accuracy,
        Proportion(round(test * len(splits.test)), len(splits.test)),
    )
    notes = {
        "start": begun, "recipe": parts, "data": splits.name, "data_digest": splits.digest, "seed": seed,
        "training": settings.model_dump(),
        "validation_accuracy": result.validation_accuracy, "test_accuracy": test,
    }  # fmt: skip
    save_checkpoint(base, out, notes)
    checkpoint.unlink()
    return result


def _copy(base: Base) -> Base:
    """The same base with weights of its own, all of which can be trained."""
    return Base(base.architecture, copy.deepcopy(base.network).requires_grad_(True))


def _at_random(architecture: Architecture, splits: Splits, seed: int) -> Base:
    """The architecture with random weights, and with the classes and statistics of the training images."""
    pixels = splits.train.images[:10_000].float() / 255
    architecture = replace(
        architecture,
        mean=tuple(round(float(v), 4) for v in pixels.mean((0, 2, 3))),
        std=tuple(round(float(v), 4) for v in pixels.std((0, 2, 3))),
        labels=splits.labels,
    )
    network = build_network(architecture, seed=seed)
    if isinstance(network, KeyedVit) and patch_embedding(network) is not None:
        initialise(network, seed)
    return Base(architecture, network)


def _parts(recipe: RecipeSettings, *, transformed: bool) -> dict[str, Any]:
    """The parts that a base is trained by, where not as by default; keyed transforms do nothing without a key."""
    names = set(PARTS_OF_TRAINING) | ({"transform"} if transformed else set())
    return {name: value for name, value in recipe.model_dump(mode="json").items() if name in names}


def initialise(vit: KeyedVit, seed: int) -> None:
    """Larger initial weights for the patch embedding (Xavier) and the position embedding (std 0.3) than timm's.

    On a small data set timm's start, made for long schedules, is slow: with 16 tokens and 16,000 Fashion-MNIST
    images, validation accuracy after one epoch is 0.74 with this start and 0.67 with timm's (seed 0).
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "pre-train", "initial weights"))
    projection = embedding_convolution(vit)
    with torch.no_grad():
        fan_out, fan_in = projection.weight.flatten(1).shape
        limit = math.sqrt(6 / (fan_in + fan_out))
        projection.weight.uniform_(-limit, limit, generator=generator)
        if vit.pos_embed is not None:
            vit.pos_embed.normal_(std=0.3, generator=generator)


def write_model_card(
    result: Pretrained, splits: Splits, settings: TrainingSettings, *, seed: int, out: Path, command: str
) -> Path:
    """Write ``<out>.md``: what the base is, how it was made, and its measured accuracy."""
    architecture, proportion = result.base.architecture, result.test_accuracy
    low, high = proportion.interval
    parameters = sum(p.numel() for p in result.base.network.parameters())
    seconds = sum(len(splits.train) / epoch.images_per_second for epoch in result.history)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "keyfoundry"))
    text = f"""# Model card: {out.stem}

- **Model**: timm `{architecture.name}` with `{architecture.arguments}`, {parameters:,} parameters,
  input {architecture.contract.channels}×{architecture.contract.height}×{architecture.contract.width} in [0, 1],
  mean {architecture.mean}, standard deviation {architecture.std} (inside the model).
- **Start**: {f"the base with digest `{result.start}`" if result.start else "random weights"}.
- **Classes**: {", ".join(architecture.labels)}.
- **Data**: `{splits.name}`, {len(splits.train):,} training, {len(splits.validation):,} validation and
  {len(splits.test):,} test images; SHA-256 of all images and labels `{splits.digest}`.
- **Test accuracy**: {proportion.value:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {proportion.n:,});
  validation accuracy {result.validation_accuracy:.4f}. The last epoch is taken; nothing was chosen on test images.
- **Command**: `{command}`
- **Recipe**: {f"`{json.dumps(result.parts)}`" if result.parts else "plain images and cross-entropy"}.
- **Seed** {seed}, **settings** `{settings.model_dump_json()}`.
- **Versions**: {versions}; Python {platform.python_version()}, {platform.machine()}.
- **Time**: {seconds / 60:.1f} minutes of training, {len(result.history)} epochs.
- **Digest** of the base: `{result.base.digest}`.

It is a starting point for keyed fine-tuning. On its own it has no protection: attacks on it succeed.
"""
    card = out.with_suffix(".md")
    write_atomic(card, text.encode())
    return card
