"""Attacks on public models and decoy keys, made once per fleet and mixed into every device's training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from device_tests.perturbation import Norm, Perturbation
from factory.recipes.part import Part
from keys.errors import InputError

if TYPE_CHECKING:
    from factory.base import Base
    from factory.data import Splits
    from factory.decoys import DecoyPool
    from factory.progress import Progress
    from factory.recipes.recipe import RecipeSettings


class DecoysPart(Part):
    """The base and ``keys`` models under decoy keys are attacked on training images; a batch holds a share of these."""

    keys: int = Field(default=2, ge=0, le=16, description="models under decoy keys, beside the public base")
    ensemble: bool = Field(default=False, description="also attack the base and all decoy keys at once")
    generations: int = Field(
        default=1, ge=1, le=4, description="2: also attack models that were trained on these decoys, as devices are; …"
    )
    share: float = Field(default=0.4, gt=0, lt=1, description="of each batch that is decoys")
    images: int = Field(default=2000, ge=1, description="training images that are attacked on each of them")
    attack: str = Field(default="mi-fgsm", description="by name, as in verification.attacks")
    steps: int = Field(default=10, ge=1)
    epsilon: float = Field(default=8 / 255, gt=0, le=1, description="L-infinity budget on inputs in [0, 1]")
    seed: int = Field(default=0, ge=0)

    @field_validator("epsilon")
    @classmethod
    def _reaches(cls, epsilon: float) -> float:
        try:
            Perturbation(Norm.LINF, epsilon)
        except InputError as error:
            raise ValueError(str(error)) from error
        return epsilon

    @model_validator(mode="after")
    def _of_keys(self) -> DecoysPart:
        if self.keys == 0 and (self.ensemble or self.generations > 1):
            raise ValueError("without decoy keys there is no ensemble and no second generation; set keys to 1 or more")
        return self

    def earlier(self) -> DecoysPart | None:
        """The decoys that this generation's models are trained on; none for the first."""
        return self.model_copy(update={"generations": self.generations - 1}) if self.generations > 1 else None

    def check(self) -> None:
        """Raise InputError if there is no such attack."""
        from factory.decoy_making import attack_of

        attack_of(self)

    def open(self, base: Base, recipe: RecipeSettings, splits: Splits, shared: Path, progress: Progress) -> DecoyPool:
        """The fleet's pool, made in ``shared`` when it is first asked for."""
        from factory.decoy_making import open_pool

        return open_pool(self, base, recipe, splits, shared, progress)
