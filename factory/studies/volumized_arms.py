"""Where the networks of the volumization study come from: made as device models are, from random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from device_tests.attacks.order_flip import OrderFlip
from factory.base import Architecture, Base, build_network, contract_for
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.device_model import make_device_model
from factory.recipes.patch_aggregate import PatchAggregatePart
from factory.recipes.recipe import RecipeSettings
from factory.recipes.volumize import VolumizePart
from factory.seeds import derive_seed
from factory.studies.spec import VolumizationSpec, VolumizedArmSettings
from factory.studies.volumization import VolumizationBench
from factory.studies.volumized_judgement import TrainArm, TrainedArm
from factory.volumization.volumize import Volumize
from keys.derive import fixed_guess

_FLIPS, _PROPOSALS = 2, 4


def arm_trainer(bench: VolumizationBench) -> TrainArm:
    """Training for the arms of a study, from random weights; a network that was trained before is read back."""
    spec = bench.spec
    splits = Splits(
        bench.splits.name, bench.splits.train.take(spec.train_images), bench.splits.validation, bench.splits.test,
        bench.splits.labels,
    )  # fmt: skip

    def train_arm(arm: VolumizedArmSettings, index: int) -> TrainedArm:
        seed = derive_seed(spec.seed, "volumization", index)
        base, recipe = base_of(arm, spec, splits.labels, seed), recipe_of(arm, spec)
        name = "-".join(part for part in (base.architecture.name, arm.order, str(index)) if part)
        # Only the order "key" looks at it; without one, and behind defences of the input, nothing is keyed.
        key = fixed_guess(f"study-{index}") if arm.order == "key" else None
        made = make_device_model(
            base, key, recipe, splits, name=name, identity=["volumization", index], seed=seed,
            folder=bench.shared / "networks" / name, shared=bench.shared / "networks" / "shared",
            progress=bench.progress,
        )  # fmt: skip
        assert isinstance(made.classifier, ImageClassifier)
        return _opened(made.classifier, spec)

    return train_arm


def base_of(arm: VolumizedArmSettings, spec: VolumizationSpec, labels: tuple[str, ...], seed: int) -> Base:
    """The arm's network with random weights: in 3D where it is volumized, else its 2D control."""
    arguments: dict[str, object] = {"in_chans": spec.channels, "img_size": spec.image_size}
    name = f"{arm.network}2d"
    if arm.order is not None:
        name, arguments["patch_size"] = f"{arm.network}3d", spec.patch_size
    half = (0.5,) * spec.channels
    architecture = Architecture(
        name, half, half, contract_for(spec.channels, spec.image_size), labels, arguments
    )  # fmt: skip
    return Base(architecture, build_network(architecture, seed=seed))


def recipe_of(arm: VolumizedArmSettings, spec: VolumizationSpec) -> RecipeSettings:
    """Everything is trained; a volumized network by the patch aggregate loss."""
    if arm.order is None:
        return RecipeSettings(adaptation="full", training=spec.training)
    return RecipeSettings(
        adaptation="full", training=spec.training, objective=PatchAggregatePart(),
        transform=VolumizePart(patch_size=spec.patch_size, order=arm.order),
    )  # fmt: skip


def _opened(model: ImageClassifier, spec: VolumizationSpec) -> TrainedArm:
    """The trained model, with its order and attacks on that where it has one."""
    volumize = model.transform
    if not isinstance(volumize, Volumize):
        return TrainedArm(model)

    def held(images: Tensor, orders: Tensor) -> Tensor:
        volumes = volumize.held(images, orders)
        return model.network((volumes - model.mean.unsqueeze(2)) / model.std.unsqueeze(2))

    def orders(images: Tensor) -> Tensor:
        with torch.no_grad():
            return volumize.orders(images)

    flip = OrderFlip(orders, held, steps=spec.pgd_steps, climbs=_FLIPS, proposals=_PROPOSALS)
    return TrainedArm(model, order=orders, order_flip=flip)
