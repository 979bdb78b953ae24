"""Makes a fleet's pool of decoys: trains the models under decoy keys, attacks them, keeps the images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from device_tests.attacks.attack import Attack
from device_tests.attacks.catalogue import named_attacks
from device_tests.crafting import craft
from device_tests.ensemble import Ensemble
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Source, Threat
from factory.base import Base
from factory.data import Splits
from factory.decoys import DecoyPool, PoolOrigin, load_pool, save_pool
from factory.device_model import make_device_model, public_model
from factory.folding import bake
from factory.progress import Progress
from factory.seeds import derive_seed
from keys.derive import fixed_guess
from keys.errors import CheckFailed

if TYPE_CHECKING:
    from factory.recipes.decoys import DecoysPart
    from factory.recipes.recipe import RecipeSettings


def open_pool(
    part: DecoysPart, base: Base, recipe: RecipeSettings, splits: Splits, shared: Path, progress: Progress
) -> DecoyPool:
    """The pool that ``part`` asks for, made if it is not yet there; ``recipe``: of the models under decoy keys.

    It lies in ``shared`` under a digest of what it is made from, so that every device finds the same. Raises
    InputError if the file there is damaged or of something else, CheckFailed if an attack breaks.
    """
    earlier = part.earlier()
    recipe = recipe.model_copy(update={"decoys": earlier, "purifier": None, "attractors": None})
    made = part.model_dump(mode="json", exclude={"share"})
    origin = PoolOrigin(base.digest, splits.digest, {"decoys": made, "recipe": recipe.model_dump(mode="json")})
    path = shared / f"decoys-{origin.digest[:12]}.safetensors"
    if not path.is_file():
        images, labels = [], []
        if earlier is not None:
            before = open_pool(earlier, base, recipe, splits, shared, progress)
            images, labels = [before.images], [before.labels]
        for source in _sources(part, base, recipe, splits, shared, progress):
            attacked = _attack(part, source, splits, shared / "decoy-attacks", progress)
            images.append(attacked)
            labels.append(splits.train.labels[: len(attacked)])
        save_pool(path, origin, images, labels)
    shape, classes = base.architecture.contract.shape, len(splits.labels)
    return load_pool(path, origin, part.share, shape=shape, classes=classes)


def attack_of(part: DecoysPart) -> Attack:
    """The attack that ``part`` names; raises InputError if there is none of that name."""
    (attack,) = named_attacks([part.attack], pgd_steps=part.steps, momentum_steps=part.steps)
    return attack


def _sources(
    part: DecoysPart, base: Base, recipe: RecipeSettings, splits: Splits, shared: Path, progress: Progress
) -> list[Source]:
    """The models of this generation, all of them at once if that is asked for, and in the first one the public base."""
    first = part.generations == 1
    prefix = "decoy" if first else f"decoy-{part.generations}"
    public = Source("decoy-base", Threat.PUBLIC_BASE, public_model(base, recipe), "the public base")
    models: list[Source] = []
    for number in range(1, part.keys + 1):
        name = f"{prefix}-{number}"
        model = make_device_model(
            base, fixed_guess(name), recipe, splits, name=name, identity=["decoy", number],
            seed=derive_seed(part.seed, name), folder=shared / "decoy-models" / name, shared=shared, progress=progress,
        )  # fmt: skip
        models.append(Source(name, Threat.GUESSED_KEY, bake(model.classifier), f"decoy key {number}"))
    sources = [public, *models] if first else models
    if part.keys and part.ensemble:
        every = Ensemble([public.model, *(source.model for source in models)])
        sources.append(Source(f"{prefix}-all", Threat.GUESSED_KEY, every, "base and all decoy keys"))
    return sources


def _attack(part: DecoysPart, source: Source, splits: Splits, cache: Path, progress: Progress) -> torch.Tensor:
    attack = attack_of(part)
    taken = splits.train.take(part.images)
    total = len(taken) * attack.gradients_per_image
    with progress.stage(f"decoys from {source.id}", total=total, unit="gradients") as stage:
        made = craft(
            source, [attack], taken.images.numpy(), taken.labels.numpy(),
            perturbation=Perturbation(Norm.LINF, part.epsilon), seed=part.seed, cache=cache / source.id,
            progress=stage.advance,
        )  # fmt: skip
    if made.failures:
        raise CheckFailed(f"The decoys could not be made: {made.failures[attack.name]}")
    return torch.from_numpy(made.images[attack.name])
