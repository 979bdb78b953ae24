"""Recipes: which parts go with which network, what is refused before training, and what a manifest holds of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from exporters.golden import GOLDEN_NAME
from exporters.manifest import Manifest
from exporters.package import sign_package, write_package
from factory.base import read_base
from factory.device_model import check_parts
from factory.networks import traits
from factory.own_networks import NAMES
from factory.purifier.settings import PurifierSettings
from factory.purifier.victim import load_victim
from factory.recipes.recipe import RecipeSettings, check_recipe
from factory.recipes.table import NETWORKS
from factory.recipes.volumize import VolumizePart
from factory.settings import BaseSettings, FleetSettings, parse
from keys.derive import fixed_guess
from keys.errors import InputError, PackageError
from keys.files import folder_being_written
from keys.signing import SigningKey

SMALL = {"vit_tiny_patch16_224": "ViT, Eva, Beit", "convmixer_small": "ConvMixer", "resnet18": "ResNet, VGG, CNN-6",
         "cnn6": "ResNet, VGG, CNN-6", "vgg11_small": "ResNet, VGG, CNN-6", "resnet3d": "3D (volumes)",
         "vgg3d": "3D (volumes)", "vgg2d": "ResNet, VGG, CNN-6"}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_the_printed_table_is_what_networks_have(name: str) -> None:
    assert NAMES  # registered by the import
    assert traits(timm.create_model(name)) == NETWORKS[SMALL[name]]


@pytest.mark.parametrize(
    ("recipe", "network", "said"),
    [
        ({}, "resnet18", "adaptation 'lora' needs a patch embedding"),
        ({}, "convmixer_small", "adaptation 'lora' needs linear layers for queries"),
        ({"adaptation": "full", "reinitialise_patch_embedding": True}, "cnn6", "reinitialise_patch_embedding needs"),
        ({"transform": {"kind": "volumize"}}, "vit_tiny_patch16_224", "transform 'volumize' needs volumes of patches"),
        ({"adaptation": "full"}, "vgg3d", "transform 'block-shuffle' needs images"),
        ({"adaptation": "full", "objective": {"kind": "patch-aggregate"}}, "resnet18", "needs logits of its own"),
    ],
)
def test_parts_that_do_not_go_together_are_one_sentence(recipe: dict[str, object], network: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check_recipe(RecipeSettings.model_validate(recipe), traits(timm.create_model(network)), network)
    assert str(caught.value).count(".") <= 2  # of the sentence, and of docs/recipes.md


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"transform": {"kind": "rot13"}}, "recipe.transform"),
        ({"transform": {"kind": "volumize", "order": "alphabetical"}}, "order"),
        ({"curriculum": {"metric": "raster", "lessons": 3}}, "there is no such setting"),
        ({"decoys": {"share": 1.0}}, "decoys.share"),
        ({"keys": {"count": 1}}, "keys.count"),
        ({"transform": {"kind": "rot13"}}, "there is no such kind; there are 'block-shuffle', 'bit-flip'"),
        ({"transform": {"shuffle": True}}, "recipe.transform: it names no kind"),
        ({"purifier": {"settings": {"stepz": 3}}}, "stepz: there is no such setting"),
        ("volumization", "recipe: should be a table of settings"),
        ({"decoys": {"epsilon": 0.001}}, "decoys.epsilon"),
    ],
)
def test_unknown_parts_and_settings_are_refused(values: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(FleetSettings, {"recipe": values}, "the settings")


@pytest.mark.parametrize(
    "recipe",
    [
        {"keys": {"count": 2}},
        {"objective": {"kind": "prototype-conformity", "inference": "nearest-prototype"}},
        {"transform": {"kind": "format-preserving", "codes": 1000}},
        {"adaptation": "full"},
    ],
)
def test_recipes_without_adapter_packages_are_one_sentence(recipe: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"^In the settings: export\.adapters needs [^{]*$"):
        parse(FleetSettings, {"recipe": recipe, "export": {"adapters": True}}, "the settings")


@pytest.mark.parametrize(
    ("base", "recipe", "said"),
    [
        ("shipped", {"block_size": 5}, "Block size 5 does not divide"),
        ("shipped", {"curriculum": {"bins": 10}}, "Histograms have 2, 4, 8"),
        ("shipped", {"decoys": {"attack": "magic"}}, "There is no attack 'magic'"),
        ("shipped", {"objective": {"kind": "prototype-conformity", "depths": ["layer9"]}}, "has no part 'layer9'"),
        ("vgg3d", {"transform": {"kind": "volumize"}}, "adaptation 'lora' needs"),
        (
            "resnet3d",
            {
                "adaptation": "full",
                "transform": {"kind": "volumize", "patch_size": 16},
                "objective": {"kind": "prototype-conformity", "depths": [1.0], "inference": "nearest-prototype"},
            },
            "answers for every patch, which the nearest prototype cannot",
        ),
        ("vgg3d", {"adaptation": "full", "transform": {"kind": "volumize", "patch_size": 5}}, "set its patch_size to"),
    ],
)
def test_what_does_not_suit_the_base_is_refused_before_training(
    base: str, recipe: dict[str, object], said: str
) -> None:
    known = read_base(BaseSettings(name=base))
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=said):
        check_parts(known, RecipeSettings.model_validate(recipe))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recipe_of_many_parts_passes_the_check() -> None:
    recipe = {"objective": {"kind": "prototype-conformity"}, "decoys": {}, "curriculum": {}, "adversarial": {},
              "keys": {"combine": "random"}, "attractors": {"count": 96, "gain": 160},
              "transform": {"kind": "bit-flip", "shuffle": True}}  # fmt: skip
    known = read_base(BaseSettings())
    state = torch.get_rng_state()
    check_parts(known, RecipeSettings.model_validate(recipe))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_that_changes_nothing_is_not_written() -> None:
    plain = RecipeSettings().model_dump(mode="json")
    assert not plain.keys() & {"transform", "objective", "adversarial", "curriculum", "decoys", "keys", "purifier"}
    chosen = RecipeSettings.model_validate({"transform": {"kind": "volumize"}, "curriculum": {"sub_batches": 2}})
    written = json.loads(chosen.model_dump_json())
    assert written["transform"]["kind"] == "volumize"
    assert written["curriculum"]["sub_batches"] == 2
    assert RecipeSettings.model_validate(written) == chosen


def test_a_network_for_other_patches_is_refused() -> None:
    network = timm.create_model("vgg3d", img_size=28, patch_size=14)
    VolumizePart(patch_size=14).check(network)
    with pytest.raises(InputError, match="made for patches of 14 pixels, and the recipe's transform cuts patches of 7"):
        VolumizePart(patch_size=7).check(network)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ({}, None),
        (
            {"purifier": {"kind": "deep-image-prior", "settings": {"steps": 20, "every": 5}}},
            PurifierSettings(steps=20, every=5),
        ),
    ],
)
def test_a_package_says_how_its_images_are_purified(
    recipe: dict[str, object],
    settings: PurifierSettings | None,
    manifest: Manifest,
    device_package: Path,
    tmp_path: Path,
) -> None:
    assert load_victim(package_of(recipe, manifest, device_package, tmp_path / "other")).settings == settings


def test_a_purifier_that_is_not_known_is_refused(manifest: Manifest, device_package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="names a purifier that this program does not know"):
        load_victim(package_of({"purifier": {"kind": "magic"}}, manifest, device_package, tmp_path / "other"))


def package_of(recipe: dict[str, object], manifest: Manifest, device_package: Path, path: Path) -> Path:
    """A copy of the fixture's package whose manifest has this recipe, signed anew."""
    with folder_being_written(path) as folder:
        for name in ("model.onnx", GOLDEN_NAME):
            (folder / name).write_bytes((device_package / name).read_bytes())
        write_package(folder, replace(manifest, recipe=recipe))
    sign_package(path, SigningKey(bytes(range(32))))
    return path


def test_a_transform_says_what_its_key_decides() -> None:
    """Nothing, where patches are put in order by a metric: the keys of two devices are one function."""
    shape = (1, 28, 28)
    assert VolumizePart(patch_size=14, order="key").permuted(shape, 14) == 4
    first, second = fixed_guess("first"), fixed_guess("second")
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    for order in ("mutual-information", "raster"):
        part = VolumizePart(patch_size=14, order=order)
        assert part.permuted(shape, 14) == 0
        assert torch.equal(part.build(first, shape, 14)(image), part.build(second, shape, 14)(image))


def test_a_parts_unknown_setting_is_looked_up_among_the_parts() -> None:
    of_a_part = {"transform": {"kind": "bit-flip", "shufle": True}}
    for values, page in ((of_a_part, "recipes"), ({"ranks": 3}, "fleet-file")):
        with pytest.raises(InputError, match=f"there is no such setting; docs/{page}.md lists all"):
            parse(FleetSettings, {"recipe": values}, "the settings")
