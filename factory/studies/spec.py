"""What a study is asked to do: one small file per study, checked before anything starts.

A spec names its arms (recipes with or without keys, each with a number of models), the perturbations, and how many
images are attacked. The shipped ones are in ``factory/assets/studies``; ``--spec`` takes any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from device_tests.perturbation import Norm, Perturbation
from factory.purifier.settings import PurifierSettings
from factory.recipes.adversarial_training import AdversarialTrainingPart
from factory.recipes.cross_entropy import CrossEntropyPart
from factory.recipes.recipe import Objective, RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.section import Section
from factory.settings import BaseSettings, DataSettings, fault_in_words, read_fleet_file
from keys.errors import InputError

RECIPES = "docs/recipes.md"
_SHIPPED = Path(__file__).parent.parent / "assets" / "studies"


def _perturbation(text: str) -> str:
    try:
        Perturbation.parse(text)
    except InputError as error:
        raise ValueError(str(error)) from error
    return text


PerturbationText = Annotated[str, AfterValidator(_perturbation)]


def _arm_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", text):
        raise ValueError("an arm's name is of a-z, 0-9 and '-'")
    return text


@dataclass(frozen=True)
class Arm:
    """One recipe of a study. ``name``: letters, digits and hyphens; ``keyed``: False for the controls."""

    name: str
    recipe: RecipeSettings
    keyed: bool


class ArmSettings(Section):
    """One row of a study: a recipe, and how many models of it there are."""

    name: Annotated[str, AfterValidator(_arm_name)]
    adaptation: Literal["lora", "full", "patch-embedding-head"] = "lora"
    block_size: int | None = Field(default=None, ge=1, description="M; none: no key, a control")
    reinitialise_patch_embedding: bool = False
    recipe: dict[str, Any] = Field(
        default={}, description="a whole recipe, as in a fleet file, over the study's and over the fields above"
    )
    models: int = Field(default=3, ge=2, description="each is a target, and a guessed key to all the others")
    images: int | None = Field(default=None, ge=1, description="test images that are attacked; default: the study's")
    autoattack_images: int | None = Field(
        default=None, ge=2, description="table1: of them, those that AutoAttack gets in L∞; default: the study's"
    )
    in_depth: bool = Field(default=False, description="also the norms and ensembles that the screened arms go without")

    @property
    def keyed(self) -> bool:
        """Whether its models have keys: it names a block size, here or in its recipe."""
        return self.recipe.get("block_size", self.block_size) is not None

    @property
    def adapts(self) -> str:
        """How its models are adapted."""
        return self.recipe.get("adaptation", self.adaptation)


class Spec(Section):
    """What all studies share."""

    seed: int = Field(default=0, ge=0)
    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    lora_training: TrainingSettings = TrainingSettings()
    full_training: TrainingSettings = TrainingSettings(learning_rate=5e-4)
    training_images: int | None = Field(default=None, ge=1, description="the first ones only; default: all")
    images: int = Field(default=300, ge=2, description="test images that are attacked")
    momentum_steps: int = Field(default=20, ge=1, description="steps of the attacks with momentum")
    bf16: bool = Field(default=False, description="gradients of the transfer attacks in bfloat16")
    strong_images: int = Field(default=80, ge=1, description="images of the self-check")
    strong_steps: int = Field(default=30, ge=1)
    strong_targets: int = Field(default=3, ge=1)
    arms: tuple[ArmSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Spec:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have one name")
        # Models of one recipe are the same models: under two names, each would be its own attacker.
        recipes = [(made.recipe, made.keyed) for made in map(self.arm, self.arms)]
        for first, second in itertools.combinations(range(len(names)), 2):
            if recipes[first] == recipes[second]:
                raise ValueError(f"the arms {names[first]} and {names[second]} are one recipe; leave one of them out")
        return self

    def arm(self, settings: ArmSettings) -> Arm:
        """The arm that the settings state; raises ValueError naming the part of its recipe that is wrong."""
        training = self.full_training if settings.adapts == "full" else self.lora_training
        values: dict[str, Any] = {
            "adaptation": settings.adaptation, "block_size": settings.block_size, "rank": self.rank,
            "alpha": self.alpha, "reinitialise_patch_embedding": settings.reinitialise_patch_embedding,
            **settings.recipe, "training": training.model_dump() | settings.recipe.get("training", {}),
        }  # fmt: skip
        try:
            recipe = RecipeSettings.model_validate(values)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            raise ValueError(f"the recipe of arm {settings.name}, {place}: {fault_in_words(fault, RECIPES)}") from error
        return Arm(settings.name, recipe, keyed=settings.keyed)


class Table1Spec(Spec):
    """The key-based paper's Table I, with the attackers and controls that it lacks."""

    study: Literal["table1"]
    perturbation: PerturbationText = Field(default="linf:4/255", description="of AutoAttack, as in the paper")
    perturbation_l2: PerturbationText | None = Field(default=None, description="of AutoAttack on the arms in depth")
    perturbation_transfer: PerturbationText = Field(default="linf:8/255", description="of the transfer attacks")
    ensembles: tuple[int, ...] = Field(default=(1, 4), description="guessed keys beside the base, arms in depth")
    screened_ensemble: int = Field(default=2, ge=1, description="guessed keys beside the base, all other arms")
    transfer_attacks: tuple[str, ...] = ("mi-di",)
    autoattack_images: int = Field(default=300, ge=2)
    autoattack_l2_images: int = Field(default=100, ge=2, description="L2 leaves more to the slow attacks at its end")
    autoattack_targets: int = Field(default=9, ge=1, description="wrong classes aimed at; the standard version: 9")
    autoattack_queries: int = Field(default=5000, ge=1, description="of Square, at the end; the standard version: 5000")


class CollusionSpec(Spec):
    """Fooling rate against the number of colluding devices."""

    study: Literal["collusion"]
    perturbation: PerturbationText = "linf:8/255"
    colluding: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    attacks: tuple[str, ...] = ("mi-di",)
    fleet_size: int = Field(default=10_000, ge=2, description="the fleet that the trend is asked about")


class ReplicationSpec(Spec):
    """How often what one device's answers led to fools another device."""

    study: Literal["replication"]
    perturbation: PerturbationText = Field(default="l2:10", description="the farthest that counts; L2 or L∞")
    queries: int = Field(default=1000, ge=101, description="labels per image")
    sources: int = Field(
        default=2, ge=1, description="models of an arm that are asked, each for its part of the images"
    )
    low_frequencies: bool = Field(
        default=False, description="ask about images without the frequencies that attractors are made of"
    )

    @model_validator(mode="after")
    def _has_targets(self) -> ReplicationSpec:
        if Perturbation.parse(self.perturbation).norm not in (Norm.L2, Norm.LINF):
            raise ValueError("HopSkipJump is made for l2 and linf")
        if few := [arm.name for arm in self.arms if arm.models <= self.sources]:
            raise ValueError(f"arm {few[0]} has no model left to be a target; give it more than {self.sources}")
        return self


class WhiteboxSpec(Spec):
    """The conformity-loss paper's white-box and black-box suite (its Table 2)."""

    study: Literal["whitebox"]
    epsilon: PerturbationText = "linf:0.3"
    further: tuple[PerturbationText, ...] = Field(default=(), description="smaller balls beside the paper's")
    carlini_wagner: PerturbationText = "l2:1.5"
    carlini_wagner_constant: float = Field(default=10.0, gt=0, description="c, the initial trade-off")
    carlini_wagner_steps: int = Field(default=100, ge=1)
    autoattack: bool = True


class LocalizedSpec(Spec):
    """N pixels and patches, as in the volumization paper (its Figure 3)."""

    study: Literal["localized"]
    pixels: tuple[int, ...] = (1, 2, 4, 8, 16)
    patches: tuple[float, ...] = (0.05, 0.1, 0.25)
    queries: int = Field(default=300, ge=10, description="per image, for the sparse random search")
    patch_steps: int = Field(default=200, ge=1)
    patch_images: int = Field(default=500, ge=1, description="training images that the universal patch is made on")


class AutoAttackBudget(Section):
    """How much AutoAttack may do; the defaults are the standard version's."""

    autoattack_steps: int = Field(default=100, ge=1, description="of its gradient attacks")
    autoattack_targets: int = Field(default=9, ge=1, description="wrong classes that it aims at")
    autoattack_queries: int = Field(default=5000, ge=1, description="of Square, at its end")


class PurifierSpec(Spec, AutoAttackBudget):
    """The deep-image-prior purifier in front of the base, and of the first model of each arm."""

    study: Literal["purifier"]
    arms: tuple[ArmSettings, ...] = Field(default=(), description="the base alone, unless there are some")
    perturbation: PerturbationText = "linf:8/255"
    purifier: PurifierSettings = PurifierSettings()
    attack_steps: int = Field(default=20, ge=1, description="of PGD")
    aware_images: int = Field(default=8, ge=1, description="images of the attacks that know the purifier")
    aware_steps: int = Field(default=10, ge=1)
    aware_samples: int = Field(default=2, ge=1, description="seeds of the purifier for each of its steps")
    aware_queries: int = Field(default=100, ge=4, description="purifications that Square may ask for, per image")
    aware_batch: int = Field(default=4, ge=1, description="images attacked and kept at a time")
    jpeg_quality: int = Field(default=20, ge=1, le=95)
    tv_weight: float = Field(default=0.08, gt=0)


class ConformityArm(ArmSettings):
    """A row of the conformity study: also how it is trained, and in which tables it stands."""

    models: int = Field(default=1, ge=1, description="further ones narrow the intervals; canaries take two")
    objective: Objective = CrossEntropyPart()
    adversarial: AdversarialTrainingPart | None = None
    tables: tuple[Literal["training", "depths"], ...] = Field(
        default=("training",), min_length=1, description="training (the paper's Tables 2, 3 and 6), depths (Table 7)"
    )


class ConformitySpec(Spec, AutoAttackBudget):
    """The conformity-loss paper's Tables 2, 3, 6 and 7, with AutoAttack beside every attack."""

    study: Literal["conformity"]
    # Sections are frozen, so that a narrower type is sound.
    arms: tuple[ConformityArm, ...] = Field(min_length=1)  # type: ignore[reportIncompatibleVariableOverride]
    surrogate: BaseSettings = BaseSettings()
    surrogate_training: TrainingSettings | None = Field(
        default=None, description="how the surrogate is trained, in full, by cross-entropy; none: it is trained already"
    )
    epsilon: PerturbationText = "linf:0.3"
    further: tuple[PerturbationText, ...] = Field(default=(), description="more balls, for the arms of Table 2")
    carlini_wagner: PerturbationText = "l2:1.5"
    carlini_wagner_constant: float = Field(default=10.0, gt=0, description="c, the initial trade-off")
    carlini_wagner_steps: int = Field(default=100, ge=1, description="of each of three searches; 0.01 each")

    def arm(self, settings: ArmSettings) -> Arm:
        """The arm with its objective and its adversarial training."""
        made = super().arm(settings)
        assert isinstance(settings, ConformityArm)
        named = settings.model_fields_set & {"objective", "adversarial"}
        if twice := sorted(named & settings.recipe.keys()):
            raise ValueError(f"the arm {settings.name} names its {twice[0]} twice: in its recipe and beside it")
        changed = {name: getattr(settings, name) for name in named}
        return Arm(made.name, made.recipe.model_copy(update=changed), made.keyed)


PatchOrder = Literal["mutual-information", "kl", "entropy", "psnr", "max-norm", "joint-entropy", "mse", "raster", "key"]
"""How a volume's patches are ordered: by a metric of the paper's Table 1, row by row, or by a key."""


class VolumizedArmSettings(Section):
    """One row of the volumization study: a network, and what stands between it and the image."""

    name: Annotated[str, AfterValidator(_arm_name)]
    network: Literal["vgg", "resnet", "efficientnet"] = Field(
        default="vgg", description="in 3D where volumized, else its 2D control"
    )
    defence: Literal["none", "lgs", "jpeg", "total-variation", "volumized"] = "none"
    order: PatchOrder | None = Field(default=None, description="of the patches, where volumized")
    models: int = Field(default=1, ge=1, description="trained from as many seeds; an interval over models takes more")

    @model_validator(mode="after")
    def _ordered(self) -> VolumizedArmSettings:
        if (self.order is not None) != (self.defence == "volumized"):
            raise ValueError("a volumized arm names its order, and no other arm does")
        return self


class VolumizationSpec(AutoAttackBudget):
    """The volumization paper's attack protocol (its section 5, Table 2 and Figure 3)."""

    study: Literal["volumization"]
    seed: int = Field(default=0, ge=0)
    data: DataSettings = DataSettings()
    image_size: int = Field(default=28, ge=4, description="images are square, of so many pixels")
    channels: Literal[1, 3] = 1
    patch_size: int = Field(default=7, ge=1, description="p, the side of the volume's patches; they tile the image")
    training: TrainingSettings = TrainingSettings()
    train_images: int | None = Field(default=None, ge=1, description="at most so many of the training images")
    images: int = Field(default=200, ge=2, description="test images that are attacked")
    pixels: tuple[int, ...] = Field(default=(1, 4, 16, 49, 98), description="N, 1 to 2·p², ascending")
    places: tuple[Literal["drawn", "searched"], ...] = Field(
        default=("drawn", "searched"), min_length=1, description="pixels at random places, as in the paper, or searched"
    )
    queries: int = Field(default=100, ge=1, description="of every N-pixel attack: per image and region")
    stops: bool = Field(default=True, description="an attack ends where its own image is wrong; else it spends all")
    patches: tuple[float, ...] = Field(default=(0.05, 0.1, 0.25), description="shares of the area, ascending")
    patch_steps: int = Field(default=200, ge=1)
    patch_images: int = Field(default=500, ge=1, description="training images that the universal patch is made on")
    perturbation: PerturbationText = Field(
        default="linf:8/255", description="of PGD, BPDA-PGD, AutoAttack and attacks on the order"
    )
    pgd_steps: int = Field(default=20, ge=1)
    order_queries: int = Field(default=100, ge=1, description="of the order search, per image")
    arms: tuple[VolumizedArmSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> VolumizationSpec:
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile images of {self.image_size}")
        most = 2 * self.patch_size**2
        if not _ascends(self.pixels) or not 1 <= self.pixels[0] <= self.pixels[-1] <= most:
            raise ValueError(f"pixels ascend from 1 to at most 2·p² = {most}")
        if not _ascends(self.patches) or not 0 < self.patches[0] <= self.patches[-1] <= 0.25:
            raise ValueError("patches ascend and cover at most 0.25 of the area")
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise ValueError("two arms have one name")
        if len(set(self.places)) < len(self.places):
            raise ValueError("places names one kind twice")
        return self


def _ascends(values: tuple[float, ...]) -> bool:
    return len(values) > 0 and all(first < second for first, second in itertools.pairwise(values))


AnySpec = (
    Table1Spec
    | CollusionSpec
    | ReplicationSpec
    | WhiteboxSpec
    | LocalizedSpec
    | PurifierSpec
    | ConformitySpec
    | VolumizationSpec
)
_READER: TypeAdapter[AnySpec] = TypeAdapter(Annotated[AnySpec, Field(discriminator="study")])


def shipped_studies() -> tuple[str, ...]:
    """Names of the specs that come with the program."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.toml")))


def read_spec(name: str, path: Path | None = None, options: Mapping[str, Any] | None = None) -> AnySpec:
    """The shipped spec of this name, or the file ``path``, with ``options`` over it; raises InputError."""
    if path is None:
        if name not in shipped_studies():
            raise InputError(f"There is no study {name!r}; there are {', '.join(shipped_studies())}.")
        path = _SHIPPED / f"{name}.toml"
    values = read_fleet_file(path) | {name: value for name, value in (options or {}).items() if value is not None}
    try:
        return _READER.validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        # The first part is the study's own name, which a file has no table for.
        place = ".".join(str(part) for part in fault["loc"][1:]) or "the spec"
        words = fault_in_words(fault, "docs/studies.md")
        raise InputError(f"In {path}, {place}: {words} (got {str(fault.get('input'))[:80]!r}).") from error
