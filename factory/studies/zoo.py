"""The models of a study: so many of each arm, trained once and shared by every study in one folder.

An arm is one recipe, with or without keys. Its models differ in their key and their seed only, so each of them is a
guessed-key model of all the others: one model serves as target, as surrogate, as sibling and as a colluding device.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from factory.base import Base
from factory.data import Splits
from factory.device_model import DeviceModel, make_device_model
from factory.folding import bake
from factory.progress import Progress
from factory.seeds import derive_seed
from factory.studies.spec import Arm
from keys.derive import fixed_guess


@dataclass(frozen=True, eq=False)
class Member:
    """Model number ``index`` of an arm: the trained model, and the same function with shuffle and adapter merged."""

    id: str
    arm: Arm
    index: int
    model: DeviceModel
    baked: nn.Module
    folder: Path


class Zoo:
    """Trains models when they are first asked for, and keeps them under ``folder`` for the next run."""

    def __init__(self, folder: Path, base: Base, splits: Splits, *, seed: int, progress: Progress) -> None:
        self.folder, self.base, self.splits, self.seed, self.progress = folder, base, splits, seed, progress
        self._members: dict[tuple[str, int], Member] = {}

    def member(self, arm: Arm, index: int) -> Member:
        """Model ``index`` ≥ 1 of an arm. Its key is public, drawn from its index: a study holds no secret."""
        digest = hashlib.sha256(json.dumps([arm.recipe.model_dump(mode="json"), arm.keyed]).encode()).hexdigest()
        known = self._members.get((digest, index))
        if known is None:
            name = f"{arm.name}-{index}"
            folder = self.folder / f"{name}-{digest[:8]}"
            model = make_device_model(
                self.base, fixed_guess(f"study-{index}") if arm.keyed else None, arm.recipe, self.splits, name=name,
                identity=["study", "keyed" if arm.keyed else "un-keyed", index],
                seed=derive_seed(self.seed, "study", index), folder=folder, shared=self.folder / "shared",
                progress=self.progress,
            )  # fmt: skip
            known = Member(name, arm, index, model, bake(model.classifier), folder)
            self._members[digest, index] = known
        return known

    def members(self, arm: Arm, count: int) -> list[Member]:
        """Models 1 … ``count`` of an arm."""
        return [self.member(arm, index) for index in range(1, count + 1)]
