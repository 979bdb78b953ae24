"""Where the networks of the volumization study come from: a small plain network here, volumized ones to be connected.

:func:`arm_trainer` is the one place that knows: it gives the study a function from an arm and a number to a trained
network, kept under what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from factory.seeds import derive_seed
from factory.studies.spec import VolumizedArmSettings
from factory.studies.volumization import VolumizationBench
from factory.studies.volumized_judgement import TrainArm, TrainedArm
from factory.train import train
from keys.errors import InputError
from keys.files import write_atomic

SMALL = "small-cnn"


def arm_trainer(bench: VolumizationBench) -> TrainArm:
    """Training for the arms of a study; a network that was trained before is read back.

    The trainer raises :class:`InputError` for a network that is not connected.
    """

    def train_arm(arm: VolumizedArmSettings, index: int) -> TrainedArm:
        spec, splits = bench.spec, bench.splits
        made_from = json.dumps(
            [
                arm.network, arm.defence, arm.order, index, spec.patch_size, spec.training.model_dump(mode="json"),
                spec.train_images, splits.digest, spec.seed,
            ]
        )  # fmt: skip
        digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        label = "-".join(part for part in (arm.network, arm.order) if part)
        folder = bench.shared / "networks" / f"{label}-{index}-{digest}"
        seed = derive_seed(spec.seed, "volumization", index)
        torch.manual_seed(derive_seed(seed, "initial weights"))
        model = network(arm, spec.channels, spec.image_size, len(splits.labels))
        weights = folder / "model.safetensors"
        if weights.is_file():
            with contextlib.suppress(SafetensorError, OSError, RuntimeError):
                model.load_state_dict(load_file(weights))
                return TrainedArm(model.eval())
        folder.mkdir(parents=True, exist_ok=True)
        train(
            model, splits.train.take(spec.train_images), splits.validation, spec.training, seed=seed,
            name=f"{label}-{index}", checkpoint=folder / "training.safetensors", progress=bench.progress,
        )  # fmt: skip
        write_atomic(weights, save({name: value.contiguous() for name, value in model.state_dict().items()}))
        (folder / "training.safetensors").unlink(missing_ok=True)
        return TrainedArm(model.eval())

    return train_arm


def network(arm: VolumizedArmSettings, channels: int, side: int, classes: int) -> nn.Module:
    """The untrained network of an arm: float N×C×H×W in [0, 1] → logits N×K, with weights from torch's generator.

    Raises :class:`InputError` for a network that is not connected to the study.
    """
    if arm.defence == "volumized" or arm.network != SMALL:
        raise InputError(
            f"The network {arm.network!r} of the arm {arm.name!r} ({arm.defence}) is not connected to this study yet; "
            f"there is {SMALL!r}, undefended or behind lgs, jpeg or total-variation."
        )
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64 * 16, classes),
    )  # fmt: skip
