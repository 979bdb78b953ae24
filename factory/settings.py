"""Every setting of the factory, with its default and the reason for it where the number is a choice.

A fleet file (TOML or YAML) holds the same names; the command line overrides it; the resolved settings are
written to ``fleet.toml`` and into the report.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, StrictInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from device_tests.perturbation import Norm, Perturbation
from exporters.formats import DEFAULT_FORMATS, OPSET, OPSETS, named_formats
from factory.recipes.format_preserving import FormatPreservingPart
from factory.recipes.recipe import RecipeSettings
from factory.section import Section
from keys.errors import InputError

DEFAULT_PRESET = "hardened"
"""What a fleet is made by when nothing is said about its base."""

_PRESETS = Path(__file__).parent / "assets" / "fleets"

SectionT = TypeVar("SectionT", bound=Section)


class DataSettings(Section):
    """Which images, and how many of the training images are held out for validation."""

    name: str = Field(default="sample", description="sample, idx, or any name that timm.data.create_dataset takes")
    root: Path | None = Field(default=None, description="folder of the data set")
    train_split: str = "train"
    test_split: str = "test"
    validation: int = Field(default=5000, ge=1, description="training images held out for validation")
    download: bool = Field(default=False, description="let torchvision or Hugging Face download the data set")
    labels: tuple[str, ...] | None = Field(default=None, description="class names, for IDX files, which have none")

    @model_validator(mode="after")
    def _apart(self) -> DataSettings:
        if self.train_split == self.test_split:
            raise ValueError("train_split and test_split must differ: no device is judged on training images")
        return self


class BaseSettings(Section):
    """The shared pre-trained network, a ViT unless another is named."""

    name: str = Field(
        default="shipped", description="shipped, hardened, a timm model name, or the path of a checkpoint"
    )
    image_size: int | None = Field(default=None, ge=4, description="input size, for timm names")
    random_weights: bool = Field(default=False, description="do not load pre-trained weights (for dry runs)")


BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {},
    "standard": {
        "images": 1000, "attacks": ("pgd", "mi-fgsm", "mi-di", "mi-bsr"), "momentum_steps": 30,
        "guessed_keys": 4, "colluding": (2, 4), "query_images": 200, "queries": 1000, "bypass_queries": 5000,
        "canaries": True, "reinitialised_control": True, "self_check_images": 200, "self_check_steps": 50,
    },
    "full": {
        "images": 1000, "momentum_steps": 50,
        "attacks": ("fgsm", "bim", "pgd", "mi-fgsm", "mi-di", "mi-bsr", "mi-ops", "mi-tgr", "autoattack"),
        "guessed_keys": 8, "colluding": (2, 4, 8), "query_images": 200, "queries": 5000, "bypass_queries": 20000,
        "canaries": True, "reinitialised_control": True, "true_key_ceiling": True,
        "self_check_images": 500, "self_check_steps": 100, "self_check_targets": 9,
    },
}  # fmt: skip
"""What each budget sets; quick is the defaults. A setting that is given by name wins over its budget."""


class VerificationSettings(Section):
    """What is attacked, how hard, and on how many images."""

    budget: Literal["quick", "standard", "full"] = Field(
        default="quick", description="quick (provisioning), standard (release) or full: sets everything below"
    )
    epsilon: float = Field(default=8 / 255, gt=0, le=1, description="L-infinity budget on inputs in [0, 1]")
    images: int = Field(default=300, ge=1, description="test images that are attacked")
    attacks: tuple[str, ...] = Field(default=("pgd", "mi-di"), min_length=1, description="attacks run on every source")
    pgd_steps: int = Field(default=20, ge=1)
    momentum_steps: int = Field(default=20, ge=1, description="steps of every attack with momentum")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="of the attacks' gradients; auto is bf16 where the hardware has it"
    )
    guessed_keys: int = Field(
        default=1, ge=1, le=8, description="guessed-key models that the attacker trains; with the base, its ensembles"
    )
    colluding: tuple[int, ...] = Field(default=(), description="how many devices collude, where the fleet has more")
    query_images: int = Field(default=0, ge=0, description="images of the query attacks on each device; 0: none")
    queries: int = Field(default=1000, ge=1, description="queries for each of those images")
    bypass_queries: int = Field(default=0, ge=0, description="queries that a learned stand-in for the key is fitted to")
    true_key_ceiling: bool = Field(default=False, description="attack a second model with each device's own key")
    canaries: bool = Field(default=False, description="look for gradient masking in every device")
    reinitialised_control: bool = Field(
        default=False, description="also judge an un-keyed model whose patch embedding was drawn anew"
    )
    parity_images: int = Field(default=256, ge=1)
    coreml_images: int = Field(default=32, ge=0, description="attacked images that also go through Core ML")
    self_check_images: int = Field(default=80, ge=1)
    self_check_steps: int = Field(default=30, ge=1)
    self_check_targets: int = Field(default=3, ge=1, description="wrong classes that the targeted strong attack tries")
    self_check_margin: float = Field(
        default=0.05, ge=0, description="how far below the strong attack an attack may stay"
    )

    @model_validator(mode="before")
    @classmethod
    def _budget(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**BUDGETS.get(str(values.get("budget", "quick")), {}), **values}
        return values

    @field_validator("epsilon")
    @classmethod
    def _reaches(cls, epsilon: float) -> float:
        try:
            Perturbation(Norm.LINF, epsilon)
        except InputError as error:
            raise ValueError(str(error)) from error
        return epsilon

    @property
    def perturbation(self) -> Perturbation:
        """The L∞ ball that the release rule is about."""
        return Perturbation(Norm.LINF, self.epsilon)


class ExportSettings(Section):
    """What a package holds, and for which systems."""

    formats: tuple[str, ...] = Field(default=DEFAULT_FORMATS, description="see keyfoundry export --help for all names")
    opset: int = Field(default=OPSET, description="of ONNX, 17 to 22")
    batch: Literal["dynamic", "static"] = Field(
        default="dynamic", description="whether the ONNX model takes any number of images at once, or one"
    )
    target: Literal["iOS16", "iOS17", "iOS18"] = Field(default="iOS16", description="oldest system for Core ML")
    calibration_images: int = Field(
        default=64, ge=1, description="validation images that static int8 takes activations' ranges from"
    )
    adapters: bool = Field(default=False, description="also make a base package, and LoRA-only packages for it")

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        try:
            named_formats(formats)
        except InputError as error:
            raise ValueError(str(error)) from error
        if "onnx-fp32" not in formats:
            raise ValueError("onnx-fp32 must be among the formats: it is what the judge attacks and measures")
        return formats

    @field_validator("opset")
    @classmethod
    def _opset(cls, opset: int) -> int:
        if opset not in OPSETS:
            raise ValueError(f"must be {OPSETS[0]} to {OPSETS[-1]}")
        return opset


class ReleaseSettings(Section):
    """Limits of the release rule; their reasons are printed in the report."""

    allowed_accuracy_drop: float = Field(default=0.03, ge=0, le=1)
    acceptable_fooling: float = Field(
        default=0.25, gt=0, lt=1, description="p0: released with probability 1 - alpha or more"
    )
    unacceptable_fooling: float = Field(
        default=0.35, gt=0, lt=1, description="p1: released with probability beta at most"
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    beta: float = Field(default=0.05, gt=0, lt=0.5)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the limits are what they are; printed in the report."""
        return (
            f"Allowed accuracy drop {self.allowed_accuracy_drop:g}: the share of all images that a key may cost the "
            "user of a device.",
            f"Acceptable fooling rate {self.acceptable_fooling:g}, unacceptable {self.unacceptable_fooling:g}. (The "
            "defaults, 0.25 and 0.35, are about half and two thirds of what an un-keyed device made by the default "
            "recipe suffers at ε = 8/255: 0.53 on validation images. A key that does not take away at least a third "
            "of the transfer is not worth shipping.)",
        )

    @model_validator(mode="after")
    def _ordered(self) -> ReleaseSettings:
        if self.acceptable_fooling >= self.unacceptable_fooling:
            raise ValueError("acceptable_fooling must be below unacceptable_fooling")
        return self


class FleetSettings(Section):
    """All settings of one fleet."""

    devices: StrictInt | list[str] = Field(default=3, description="a number, or the device ids")
    seed: int = Field(default=0, ge=0, description="seed of all public randomness; keys never depend on it")
    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    recipe: RecipeSettings = RecipeSettings()
    export: ExportSettings = ExportSettings()
    verification: VerificationSettings = VerificationSettings()
    release: ReleaseSettings = ReleaseSettings()

    @model_validator(mode="after")
    def _adapters(self) -> FleetSettings:
        recipe = self.recipe
        if self.export.adapters and recipe.adaptation != "lora":
            raise ValueError(f"export.adapters needs recipe.adaptation lora, not {recipe.adaptation}")
        if self.export.adapters and recipe.objective.changes_network:
            raise ValueError("export.adapters needs recipe.objective.inference softmax, as others end the graph anew")
        if self.export.adapters and recipe.keys is not None:
            raise ValueError("export.adapters needs one key per device, not an ensemble as recipe.keys asks for")
        if self.export.adapters and recipe.attractors is not None:
            raise ValueError(
                "export.adapters needs the base's own graph, which has no attractors; leave one of them out"
            )
        encryption = recipe.transform if isinstance(recipe.transform, FormatPreservingPart) else None
        if self.export.adapters and encryption is not None and encryption.codes != 256:
            raise ValueError(f"export.adapters needs format-preserving encryption of 256 codes, not {encryption.codes}")
        return self

    @property
    def device_ids(self) -> tuple[str, ...]:
        """The devices' ids; a number n stands for device-1 … device-n."""
        if isinstance(self.devices, int):
            return tuple(f"device-{index}" for index in range(1, self.devices + 1))
        return tuple(self.devices)


def parse(section: type[SectionT], values: Mapping[str, Any], where: str) -> SectionT:
    """Check ``values`` against a section; the first fault becomes one InputError that names the setting."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        if not fault["loc"]:  # of several settings together: its words name them
            raise InputError(f"In {where}: {fault_in_words(fault)}.") from error
        name = ".".join(str(part) for part in fault["loc"])
        raise InputError(f"In {where}, {name}: {fault_in_words(fault)} (got {fault.get('input')!r}).") from error


def fault_in_words(fault: ErrorDetails, page: str = "docs/fleet-file.md") -> str:
    """What is wrong, in words of fleet files and not of the library that checks them; ``page`` lists settings."""
    if fault["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        of_a_part = "recipe" in fault["loc"][:1] and len(fault["loc"]) > 2 and fault["loc"][1] != "training"
        return f"there is no such setting; {'docs/recipes.md' if of_a_part else page} lists all"
    if fault["type"] == "tuple_type":
        return "should be a list, in square brackets"
    if fault["type"] == "union_tag_invalid":
        return f"there is no such kind; there are {fault.get('ctx', {})['expected_tags']}"
    if fault["type"] == "union_tag_not_found":
        return "it names no kind; docs/recipes.md lists all"
    if fault["type"] in {"model_type", "model_attributes_type", "dataclass_type"}:
        return "should be a table of settings"
    return fault["msg"].removeprefix("Value error, ").removesuffix(".")


def presets() -> tuple[str, ...]:
    """Names of the embedded fleet files."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))


def read_preset(name: str) -> dict[str, Any]:
    """The settings in an embedded fleet file; raises InputError if there is none of that name."""
    if name not in presets():
        raise InputError(f"There is no preset {name!r}; there are {', '.join(presets())}.")
    return read_fleet_file(_PRESETS / f"{name}.toml")


def preset_settings(name: str) -> FleetSettings:
    """An embedded fleet file as it stands; raises InputError if there is none of that name."""
    return parse(FleetSettings, read_preset(name), name)


def read_fleet_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML or YAML fleet file, not yet checked."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"The fleet file {path} does not exist.") from error
    except (OSError, tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The fleet file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"The fleet file {path} holds no table of settings.")
    return values
