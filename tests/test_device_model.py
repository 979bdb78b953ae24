"""One device model: keyed as its key says, made once, made anew when anything it was made from changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from factory.adaptation import adapt
from factory.base import Base
from factory.data import Splits
from factory.device_model import (
    DeviceModel,
    block_size,
    keyed_transform,
    made_of_something_else,
    make_device_model,
)
from factory.progress import Progress
from factory.recipes.key_ensemble import KeyEnsemblePart
from factory.recipes.recipe import RecipeSettings
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError
from keys.permutation import permutation

RECIPE = RecipeSettings.model_validate({"rank": 2, "training": {"epochs": 1, "batch_size": 100}})


@pytest.fixture(scope="module")
def few(tiny_splits: Splits) -> Splits:
    train = tiny_splits.train.take(200)
    return Splits("few", train, tiny_splits.validation.take(50), tiny_splits.test.take(50), tiny_splits.labels)


def make(
    base: Base, splits: Splits, folder: Path, *, key: DeviceKey | None = None, recipe: RecipeSettings = RECIPE,
    identity: Sequence[str | int] = ("fleet", "a", 1), seed: int = 1,
) -> tuple[DeviceModel, bool]:  # fmt: skip
    """The model, and whether it was trained in this call."""
    progress = Progress(quiet=True)
    model = make_device_model(
        base,
        key,
        recipe,
        splits,
        name="a",
        identity=identity,
        seed=seed,
        folder=folder,
        shared=folder / "shared",
        progress=progress,
    )
    return model, bool(progress.seconds)


def test_a_finished_model_is_loaded_and_another_one_trained(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    key = fixed_guess("a")
    first, trained = make(tiny_base, few, tmp_path, key=key)
    assert trained
    again, trained = make(tiny_base, few, tmp_path, key=key)
    assert not trained
    assert (again.adapter_digest, again.history) == (first.adapter_digest, first.history)
    images = few.test.images.float() / 255
    with torch.no_grad():
        assert torch.equal(again.classifier(images), first.classifier(images))
    # What it was made from changed, one thing at a time: its place is taken by the new model.
    wider = RECIPE.model_copy(update={"rank": 3})
    fewer = Splits("fewer", few.train.take(150), few.validation, few.test, few.labels)
    assert make(tiny_base, few, tmp_path, key=key, identity=("fleet", "a", 2))[1]
    assert make(tiny_base, few, tmp_path, key=key, recipe=wider)[1]
    assert make(tiny_base, few, tmp_path, key=key, seed=2)[1]
    assert make(tiny_base, fewer, tmp_path, key=key)[1]
    assert make(tiny_base, few, tmp_path, key=key)[0].adapter_digest == first.adapter_digest


def test_a_model_says_how_it_was_made(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    model, _ = make(tiny_base, few, tmp_path, key=fixed_guess("a"), seed=9)
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["seed"] == 9
    assert record["trainable_parameters"] == model.trainable_parameters
    assert record["adapter_digest"] == model.adapter_digest
    assert len(record["history"]) == len(model.history) == 1


def test_a_model_of_another_base_other_data_or_another_recipe_is_known(
    tiny_base: Base, few: Splits, tmp_path: Path
) -> None:
    assert not made_of_something_else(tmp_path / "none", tiny_base, RECIPE, few)
    for name, recipe in (("one", RECIPE), ("two", RECIPE.model_copy(update={"keys": KeyEnsemblePart()}))):
        folder = tmp_path / name
        make(tiny_base, few, folder, key=fixed_guess("a"), recipe=recipe, seed=3)
        assert not made_of_something_else(folder, tiny_base, recipe, few)
        other = Base(tiny_base.architecture, adapt(tiny_base.network, RecipeSettings(adaptation="full")))
        with torch.no_grad():
            next(other.network.parameters()).add_(1e-3)
        fewer = Splits("fewer", few.train.take(150), few.validation, few.test, few.labels)
        assert made_of_something_else(folder, other, recipe, few)
        assert made_of_something_else(folder, tiny_base, recipe, fewer)
        assert made_of_something_else(folder, tiny_base, recipe.model_copy(update={"rank": 3}), few)
        # A rotated key makes another model, of the same things.
        make(tiny_base, few, folder, key=fixed_guess("b"), recipe=recipe, identity=("fleet", "a", 2))
        assert not made_of_something_else(folder, tiny_base, recipe, few)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_changed_after_training_is_refused(tiny_base: Base, few: Splits, tmp_path: Path, name: str) -> None:
    make(tiny_base, few, tmp_path)
    path = tmp_path / "adapter" / name
    data = bytearray(path.read_bytes())
    # The last byte of a weight; a space more in the configuration.
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("safetensors") else data + b" ")
    with pytest.raises(InputError, match=r"was changed after training; delete .* to make it anew"):
        make(tiny_base, few, tmp_path)


def test_the_shuffle_is_what_the_key_stands_for(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    key = fixed_guess("a")
    shuffle = keyed_transform(tiny_base, RECIPE, key)
    assert shuffle.permutation.tolist() == permutation(key, 49).tolist()
    coarse = RECIPE.model_copy(update={"block_size": 14})
    assert keyed_transform(tiny_base, coarse, key).permutation.tolist() == permutation(key, 196).tolist()
    model, _ = make(tiny_base, few, tmp_path, key=key)
    assert model.classifier.transform is not None
    assert torch.equal(model.classifier.transform.permutation, shuffle.permutation)


def test_the_control_has_no_shuffle(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    assert make(tiny_base, few, tmp_path)[0].classifier.transform is None


def test_the_block_size_is_the_patch_size_unless_stated(tiny_base: Base) -> None:
    assert block_size(tiny_base, RECIPE) == 7
    assert block_size(tiny_base, RECIPE.model_copy(update={"block_size": 28})) == 28
    with pytest.raises(InputError, match="Block size 5 does not divide the image of 28×28 pixels"):
        block_size(tiny_base, RECIPE.model_copy(update={"block_size": 5}))


def test_no_file_of_a_model_holds_its_key(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    key = fixed_guess("a")
    make(tiny_base, few, tmp_path, key=key)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert key.secret not in path.read_bytes()
            assert key.secret.hex().encode() not in path.read_bytes()
