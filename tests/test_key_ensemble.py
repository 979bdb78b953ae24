"""Several keys in one device: trained each by itself, one module, one choice for all runtimes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.export import ExportPlan, Templates, export
from exporters.formats import FORMATS
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.adapter_package import export_base_package
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.device_model import DeviceModel, make_device_model
from factory.folding import bake
from factory.keyed_transforms.key_ensemble import KeyEnsemble, behind
from factory.progress import Progress
from factory.recipes.key_ensemble import KeyEnsemblePart
from factory.recipes.recipe import RecipeSettings
from factory.settings import FleetSettings, parse
from factory.vits import KeyedVit
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError

KEY = fixed_guess("device")


def recipe_of(combine: str, **changed: object) -> RecipeSettings:
    values = {"rank": 2, "training": {"epochs": 1, "batch_size": 50}, "keys": {"count": 2, "combine": combine}}
    return RecipeSettings.model_validate(values | changed)


@pytest.fixture(scope="module")
def few(tiny_splits: Splits) -> Splits:
    train = tiny_splits.train.take(100)
    return Splits("few", train, tiny_splits.validation.take(50), tiny_splits.test.take(50), tiny_splits.labels)


@pytest.fixture(scope="module")
def grey(sample_images: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """64 real images float32 N×1×28×28 in [0, 1], of 8 bits."""
    return torch.from_numpy(sample_images[0][:64, None]).float() / 255


def make(
    base: Base, splits: Splits, folder: Path, recipe: RecipeSettings, key: DeviceKey | None = KEY
) -> tuple[DeviceModel, int]:
    """The device's model, and how many of its members were trained in this call."""
    progress = Progress(quiet=True)
    model = make_device_model(
        base,
        key,
        recipe,
        splits,
        name="a",
        identity=["fleet", "a", 1],
        seed=1,
        folder=folder,
        shared=folder / "shared",
        progress=progress,
    )
    return model, len(progress.seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ensemble")


@pytest.fixture(scope="module")
def chosen(tiny_base: Base, few: Splits, folder: Path) -> DeviceModel:
    """A trained ensemble of two keys, of which one answers."""
    return make(tiny_base, few, folder, recipe_of("random"))[0]


def ensemble_of(model: DeviceModel) -> KeyEnsemble:
    assert isinstance(model.classifier, KeyEnsemble)
    return model.classifier


# Training


def test_each_key_has_a_model_of_its_own_that_is_kept(
    chosen: DeviceModel, tiny_base: Base, few: Splits, folder: Path, grey: Tensor
) -> None:
    again, trained = make(tiny_base, few, folder, recipe_of("random"))
    assert trained == 0
    assert (again.adapter_digest, again.history) == (chosen.adapter_digest, chosen.history)
    assert len(again.history) == 2
    records = [json.loads((folder / f"key-{number}" / "model.json").read_text()) for number in (1, 2)]
    assert len({record["adapter_digest"] for record in records}) == 2
    assert chosen.trainable_parameters == sum(record["trainable_parameters"] for record in records)
    with torch.no_grad():
        assert torch.equal(again.classifier(grey), chosen.classifier(grey))
        first, second = (member(grey) for member in ensemble_of(chosen).members)
    assert not torch.equal(first, second)


def test_an_interrupted_ensemble_goes_on_with_what_is_missing(
    chosen: DeviceModel, tiny_base: Base, few: Splits, folder: Path, tmp_path: Path
) -> None:
    """How members are combined does not change them; one that is lost is made again, the same."""
    copied = tmp_path / "device"
    for source in folder.rglob("*"):
        if source.is_file() and "key-2" not in source.parts:
            place = copied / source.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
    averaged, trained = make(tiny_base, few, copied, recipe_of("average"))
    assert trained == 1
    assert averaged.adapter_digest == chosen.adapter_digest
    assert ensemble_of(averaged).order is None


def test_members_keys_differ_from_the_devices_and_from_each_other() -> None:
    part = KeyEnsemblePart(count=4)
    keys = [key for key in part.member_keys(KEY) if key is not None]
    assert len({KEY.secret, *(key.secret for key in keys)}) == 5
    again = [key for key in KeyEnsemblePart(count=2).member_keys(KEY) if key is not None]
    assert [key.secret for key in again] == [key.secret for key in keys[:2]]
    assert part.member_keys(None) == [None] * 4


def test_an_unkeyed_control_has_as_many_models_and_no_transform(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    control, trained = make(tiny_base, few, tmp_path, recipe_of("random"), key=None)
    assert trained == 2
    assert [member.transform for member in ensemble_of(control).members] == [None, None]
    order = ensemble_of(control).order
    assert order is not None
    assert torch.equal(order, torch.arange(784))


# Answers


def test_the_mean_of_the_logits_or_those_of_the_chosen_one(chosen: DeviceModel, grey: Tensor) -> None:
    model = ensemble_of(chosen)
    with torch.no_grad():
        logits = torch.stack([member(grey) for member in model.members])
        choice = model.choice(grey)
        assert torch.equal(model(grey), logits[choice.long(), torch.arange(len(grey))])
        averaged = KeyEnsemble(list(model.members))(grey)
    assert torch.allclose(averaged, logits.mean(0), atol=1e-6)
    assert set(choice.tolist()) == {0, 1}


def test_the_choice_is_that_of_whole_numbers_and_spreads_over_the_members(
    sample_images: tuple[np.ndarray, np.ndarray],
) -> None:
    pixels = sample_images[0][:600]
    part = KeyEnsemblePart(count=3, combine="random")
    model = part.build([nn.Identity()] * 3, KEY, (1, 28, 28))
    assert model.order is not None
    weights = 1 + np.arange(784) % min(784, (2**31 - 1) // (255 * 784))
    sums = (pixels.reshape(600, -1).astype(np.int64)[:, model.order.numpy()] * weights).sum(1)
    assert sums.max() < 2**31
    found = model.choice(torch.from_numpy(pixels[:, None]).float() / 255)
    assert np.array_equal(found.numpy(), sums % 3)
    # Binomial(600, ⅓) has a standard deviation of 12.
    assert np.all(np.abs(np.bincount(sums % 3) - 200) < 60)


def test_a_change_of_one_level_moves_the_choice_at_most_places(grey: Tensor) -> None:
    """What an attacker who can ask gains: small changes pick another member, so that the weakest one counts."""
    part = KeyEnsemblePart(count=4, combine="random")
    model = part.build([nn.Identity()] * 4, KEY, (1, 28, 28))
    changed = grey[:1].repeat(784, 1, 1, 1).flatten(1)
    changed += torch.eye(784) * torch.where(changed < 0.5, 1 / 255, -1 / 255)
    moved = model.choice(changed.view(-1, 1, 28, 28)) != model.choice(grey[:1])
    # Weights of which every fourth is a multiple of four.
    assert float(moved.float().mean()) == pytest.approx(0.75, abs=0.01)


def test_the_largest_images_still_have_a_choice_and_larger_ones_are_refused() -> None:
    values = 3 * 224 * 224
    model = KeyEnsemble([nn.Identity()] * 2, np.arange(values))
    assert int(model.weights.max()) * 255 * values < 2**31
    white = model.choice(torch.ones(1, 3, 224, 224))
    assert int(white) == int(255 * model.weights.long().sum() % 2)
    with pytest.raises(InputError, match="too large to choose among 16 keys"):
        KeyEnsemble([nn.Identity()] * 16, np.arange(3 * 512 * 512))


def test_an_average_chooses_nothing_and_one_member_is_no_ensemble(grey: Tensor) -> None:
    with pytest.raises(InputError, match="averages its members"):
        KeyEnsemble([nn.Identity(), nn.Identity()]).choice(grey)
    with pytest.raises(InputError, match="two or more members"):
        KeyEnsemble([nn.Identity()])


def test_behind_another_devices_keys(chosen: DeviceModel, grey: Tensor) -> None:
    model = ensemble_of(chosen)
    other = model.each(lambda member: member)
    other.members = nn.ModuleList(reversed(list(model.members)))
    with torch.no_grad():
        assert torch.equal(behind(model, model)(grey), model(grey))
        assert not torch.equal(behind(model, other)(grey), model(grey))
        plain = behind(model, None)
        assert isinstance(plain, KeyEnsemble)
        assert [member.transform for member in plain.members] == [None, None]
        single = model.members[0]
        assert isinstance(single, ImageClassifier)
        assert torch.equal(behind(single, single)(grey), single(grey))


# Packages


@pytest.mark.parametrize("combine", ["average", "random"])
def test_a_package_answers_as_the_ensemble_and_comes_from_a_template(
    combine: str, chosen: DeviceModel, tiny_base: Base, grey: Tensor, tmp_path: Path
) -> None:
    members = list(ensemble_of(chosen).members)
    part = recipe_of(combine).keys
    assert part is not None
    told: list[str] = []
    templates = Templates(tmp_path / "templates", {"fleet_id": "0" * 16}, told.append)
    formats = ("onnx-fp32", "coreml-fp16") if combine == "random" else ("onnx-fp32", "onnx-int8")
    plan = ExportPlan(tiny_base.architecture.contract, tiny_base.architecture.labels, formats)
    (tmp_path / "first").mkdir()
    export(
        bake(part.build(members[::-1], fixed_guess("first"), (1, 28, 28)).eval()), tmp_path / "first", plan, templates
    )
    model = part.build(members, fixed_guess("second"), (1, 28, 28)).eval()
    baked = bake(model)
    assert isinstance(baked, KeyEnsemble)
    assert all(isinstance(member, KeyedVit) for member in baked.members)
    (tmp_path / "second").mkdir()
    done = export(baked, tmp_path / "second", plan, templates)
    assert done.from_template
    (tmp_path / "full").mkdir()
    assert dict(export(baked, tmp_path / "full", plan, None).digests) == dict(done.digests)
    assert told == []
    with torch.no_grad():
        reference = model(grey).numpy()
    assert np.allclose(TorchRuntime(baked).logits(grey.numpy()), reference, atol=1e-5 * np.abs(reference).max())
    for name in formats:
        path = tmp_path / "second" / FORMATS[name].path
        runtime = OnnxRuntime(path) if path.suffix == ".onnx" else CoreMLEvaluator(path)
        difference = np.abs(runtime.logits(grey.numpy()) - reference).max() / np.abs(reference).max()
        assert difference <= FORMATS[name].limits.difference


# Refusals


def test_adapter_packages_hold_one_key(tiny_base: Base, tmp_path: Path, grey: Tensor) -> None:
    from datetime import UTC, datetime

    images = (grey * 255).to(torch.uint8).numpy()
    with pytest.raises(InputError, match="one key, not an ensemble"):
        export_base_package(
            tiny_base, recipe_of("average"), "0" * 16, images, tmp_path / "base", Progress(quiet=True),
            created=datetime(2030, 1, 1, tzinfo=UTC),
        )  # fmt: skip
    assert not (tmp_path / "base").exists()
    with pytest.raises(InputError, match="one key per device"):
        parse(FleetSettings, {"export": {"adapters": True}, "recipe": {"keys": {"count": 2}}}, "the file")


@pytest.mark.parametrize("keys", [{"count": 1}, {"count": 17}, {"combine": "vote"}])
def test_what_is_no_ensemble_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"recipe\.keys"):
        parse(FleetSettings, {"recipe": {"keys": keys}}, "the file")


def test_without_it_no_recipe_changes_its_name() -> None:
    assert "keys" not in RecipeSettings().model_dump(mode="json")
    assert recipe_of("random").model_dump(mode="json")["keys"] == {
        "kind": "key-ensemble", "count": 2, "combine": "random",
    }  # fmt: skip
