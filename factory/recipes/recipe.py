"""A recipe: how a device model is made from the base and a key. Data only; each part's file says what it does.

>>> RecipeSettings().model_dump()["rank"]
16
>>> check_recipe(RecipeSettings(), frozenset({Trait.IMAGES}), "resnet18")
Traceback (most recent call last):
...
keys.errors.InputError: The recipe's adaptation 'lora' needs a patch embedding by one convolution of the image, which \
resnet18 does not have; docs/recipes.md says which parts go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from factory.recipes.adversarial_training import AdversarialTrainingPart
from factory.recipes.attractors import AttractorsPart
from factory.recipes.bit_flip import BitFlipPart
from factory.recipes.block_shuffle import BlockShufflePart
from factory.recipes.cross_entropy import CrossEntropyPart
from factory.recipes.decoys import DecoysPart
from factory.recipes.distillation import DistillationPart
from factory.recipes.format_preserving import FormatPreservingPart
from factory.recipes.key_ensemble import KeyEnsemblePart
from factory.recipes.part import Part, Trait
from factory.recipes.patch_aggregate import PatchAggregatePart
from factory.recipes.prototype_conformity import PrototypeConformityPart
from factory.recipes.purifier import DeepImagePriorPart
from factory.recipes.syllabus import SyllabusPart
from factory.recipes.training import TrainingSettings
from factory.recipes.volumize import VolumizePart
from factory.section import Section
from keys.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from factory.objective import Objective as TrainingObjective

Transform = Annotated[BlockShufflePart | BitFlipPart | FormatPreservingPart | VolumizePart, Field(discriminator="kind")]
Objective = Annotated[
    CrossEntropyPart | DistillationPart | PrototypeConformityPart | PatchAggregatePart, Field(discriminator="kind")
]

ADAPTATION_NEEDS: Mapping[str, tuple[Trait, ...]] = {
    "lora": (Trait.PATCH_EMBEDDING, Trait.ATTENTION),
    "full": (),
    "patch-embedding-head": (Trait.PATCH_EMBEDDING,),
}
"""What each way to adapt needs of the network."""

PARTS = ("transform", "objective", "adversarial", "curriculum", "decoys", "keys", "attractors", "purifier")
"""The settings that choose a part."""

PARTS_OF_TRAINING = ("objective", "adversarial", "curriculum", "decoys")
"""Of these, the parts that say what a network is trained on, and what for."""

ADDED_LATER = (*PARTS, "train_patch_embedding")
"""The settings that a recipe is written without where they change nothing: those from before them keep their names."""


class RecipeSettings(Section):
    """How a device model is made from the base and a key."""

    block_size: int | None = Field(
        default=None, ge=1, description="M of the block shuffle; default: the base's patch size"
    )
    adaptation: Literal["lora", "full", "patch-embedding-head"] = "lora"
    rank: int = Field(default=16, ge=1, description="LoRA rank r; the paper's value")
    alpha: float = Field(default=16.0, gt=0, description="LoRA scaling numerator: updates are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    reinitialise_patch_embedding: bool = Field(
        default=False, description="draw the patch embedding anew and train it in full (a control; needs no key)"
    )
    train_patch_embedding: bool = Field(
        default=False, description="LoRA: train the patch embedding in full instead, from the base's values"
    )
    training: TrainingSettings = TrainingSettings()
    transform: Transform = BlockShufflePart()
    objective: Objective = CrossEntropyPart()
    adversarial: AdversarialTrainingPart | None = Field(default=None, description="also train on attacks")
    curriculum: SyllabusPart | None = Field(default=None, description="the order of the images in a batch")
    decoys: DecoysPart | None = Field(default=None, description="also train on attacks that were made elsewhere")
    keys: KeyEnsemblePart | None = Field(default=None, description="several keys in one device")
    attractors: AttractorsPart | None = Field(default=None, description="what searches by answers alone run into")
    purifier: DeepImagePriorPart | None = Field(default=None, description="what a server does to images first")

    @model_validator(mode="after")
    def _is_asked_of_lora(self) -> RecipeSettings:
        if self.train_patch_embedding and self.adaptation != "lora":
            raise ValueError(
                f"train_patch_embedding is for adaptation 'lora'; {self.adaptation!r} trains the patch embedding anyway"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later and changes nothing is left out, so that it renames no model that was made before it."""
        values: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        unchanged = {name for name in ADDED_LATER if getattr(self, name) == fields[name].default}
        return {name: value for name, value in values.items() if name not in unchanged}

    def loss(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> TrainingObjective:
        """What training ``network`` minimises: the objective, on attacks as well if the recipe has them."""
        objective = self.objective.build(network, classes, label_smoothing, base)
        return objective if self.adversarial is None else self.adversarial.build(objective)

    @property
    def whole_patch_embedding(self) -> bool:
        """Whether LoRA leaves the patch embedding to be trained in full."""
        return self.reinitialise_patch_embedding or self.train_patch_embedding

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that were chosen, by the setting that chooses them."""
        return {name: part for name in PARTS if isinstance(part := getattr(self, name), Part)}


def check_recipe(recipe: RecipeSettings, traits: frozenset[Trait], network: str) -> None:
    """Raise InputError unless the parts go together and the network called ``network`` has what they need."""
    needs: list[tuple[str, Trait]] = [
        (f"adaptation {recipe.adaptation!r}", trait) for trait in ADAPTATION_NEEDS[recipe.adaptation]
    ]
    if recipe.reinitialise_patch_embedding:
        needs.append(("reinitialise_patch_embedding", Trait.PATCH_EMBEDDING))
    needs += [(f"{name} {part.name!r}", trait) for name, part in recipe.parts.items() for trait in sorted(part.needs)]
    for what, trait in needs:
        if trait not in traits:
            raise InputError(
                f"The recipe's {what} needs {trait.value}, which {network} does not have; docs/recipes.md says which "
                "parts go together."
            )
