"""What is trained, how much of it, and how it is saved: peft's format, no pickle, nothing lost."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from factory.adaptation import adapt, adapter_digest, load_adapter, merge, save_adapter, trainable_parameters
from factory.base import Base, build_network, timm_architecture
from factory.classifier import ImageClassifier
from factory.data import Split, Splits
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.train import train
from keys.errors import InputError

MODES = ["lora", "full", "patch-embedding-head"]


def recipe_of(mode: str, **values: object) -> RecipeSettings:
    return RecipeSettings.model_validate({"adaptation": mode, "rank": 4, **values})


@pytest.fixture(scope="module")
def vit_base() -> VisionTransformer:
    """``vit_base_patch16_224`` with random weights and ten classes."""
    return build_network(timm_architecture("vit_base_patch16_224", tuple("0123456789"), None))


@pytest.mark.parametrize(("classes", "count"), [(10, 622_090), (1000, 1_383_400)])
def test_lora_of_rank_16_on_vit_base_has_the_papers_count(
    vit_base: VisionTransformer, classes: int, count: int
) -> None:
    vit_base.reset_classifier(classes)
    model = adapt(vit_base, RecipeSettings())
    assert trainable_parameters(model) == count
    # Patch embedding 16·(768 + 768), twelve times qkv 16·(768 + 2304), and the whole head.
    assert count == 16 * (768 + 768) + 12 * 16 * (768 + 3 * 768) + classes * 769


def test_the_other_modes_counts_on_vit_base(vit_base: VisionTransformer) -> None:
    vit_base.reset_classifier(10)
    blocks = 12 * (2 * 2 * 768 + 769 * 3 * 768 + 769 * 768 + 769 * 4 * 768 + (4 * 768 + 1) * 768)
    patches = (3 * 16 * 16 + 1) * 768
    everything = patches + 768 + 197 * 768 + blocks + 2 * 768 + 769 * 10
    assert trainable_parameters(adapt(vit_base, recipe_of("full"))) == everything == 85_806_346
    assert trainable_parameters(adapt(vit_base, recipe_of("patch-embedding-head"))) == patches + 769 * 10


def test_rank_alpha_and_dropout_are_settings(tiny_base: Base) -> None:
    model = adapt(tiny_base.network, recipe_of("lora", rank=3, alpha=12, dropout=0.25))
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"].to_dict()
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12, 0.25)
    # Two blocks of 48 values, patches of 49 pixels, ten classes.
    assert trainable_parameters(model) == 3 * (49 + 48) + 2 * 3 * (48 + 3 * 48) + 10 * 49


def test_a_patch_embedding_can_be_trained_in_full_beside_lora(vit_base: VisionTransformer, tiny_base: Base) -> None:
    vit_base.reset_classifier(1000)
    whole = recipe_of("lora", rank=16, train_patch_embedding=True)
    assert trainable_parameters(adapt(vit_base, whole)) == 12 * 16 * (768 + 3 * 768) + 769 * 768 + 769 * 1000
    model = adapt(tiny_base.network, whole)
    # It begins as the base's own, unlike the control that draws it anew.
    images = torch.rand(4, *tiny_base.architecture.contract.shape)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), tiny_base.network.eval()(images))


def test_recipes_without_it_are_written_as_before_there_was_one() -> None:
    assert "train_patch_embedding" not in RecipeSettings().model_dump()
    assert RecipeSettings(train_patch_embedding=True).model_dump()["train_patch_embedding"] is True


@pytest.fixture(scope="module")
def small(tiny_splits: Splits) -> Split:
    return tiny_splits.train.take(200)


@pytest.fixture(scope="module", params=MODES)
def trained(
    request: pytest.FixtureRequest,
    tiny_base: Base,
    small: Split,
    silent: Progress,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RecipeSettings, torch.nn.Module]:
    """One epoch of each mode, in evaluation mode."""
    recipe = recipe_of(request.param)
    model = adapt(tiny_base.network, recipe)
    architecture = tiny_base.architecture
    train(
        ImageClassifier(model, architecture.mean, architecture.std), small, small, TrainingSettings(epochs=1), seed=0,
        name="a test", checkpoint=tmp_path_factory.mktemp("train") / "c.safetensors", progress=silent,
    )  # fmt: skip
    return recipe, model


def test_training_moves_exactly_what_the_recipe_trains(
    trained: tuple[RecipeSettings, torch.nn.Module], tiny_base: Base
) -> None:
    recipe, model = trained
    fresh = dict(adapt(tiny_base.network, recipe).named_parameters())
    for name, parameter in model.named_parameters():
        # lora_A is drawn at random; what it was is not known here.
        if "lora_A" not in name:
            assert torch.equal(parameter, fresh[name]) != parameter.requires_grad, name
    merged, base = merge(model).state_dict(), tiny_base.network.state_dict()
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    expected = {
        "lora": {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}
        | {"head.weight", "head.bias"},
        "full": set(base),
        "patch-embedding-head": {"patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"},
    }
    assert moved == expected[recipe.adaptation]


def test_a_saved_adapter_comes_back_bit_for_bit(
    trained: tuple[RecipeSettings, torch.nn.Module], tiny_base: Base, small: Split, tmp_path: Path
) -> None:
    recipe, model = trained
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_base.network, recipe, tmp_path / "adapter")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(small.images.float()), loaded(small.images.float()))
    save_adapter(loaded, tmp_path / "again")
    assert adapter_digest(tmp_path / "again") == adapter_digest(tmp_path / "adapter")


def test_an_adapters_folder_is_private_and_holds_no_pickle(
    trained: tuple[RecipeSettings, torch.nn.Module], tmp_path: Path
) -> None:
    recipe, model = trained
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name for path in folder.rglob("*")}
    assert names == {"adapter_model.safetensors"} | ({"adapter_config.json"} if recipe.adaptation == "lora" else set())
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == trainable_parameters(model)


def test_peft_itself_opens_the_adapter(tiny_base: Base, tmp_path: Path) -> None:
    save_adapter(adapt(tiny_base.network, recipe_of("lora")), tmp_path / "adapter")
    fresh = build_network(tiny_base.architecture)
    model = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))  # type: ignore[arg-type]
    assert isinstance(model.merge_and_unload(), VisionTransformer)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_adapter_and_one_of_another_base_are_refused(tiny_base: Base, tmp_path: Path, mode: str) -> None:
    recipe = recipe_of(mode)
    save_adapter(adapt(tiny_base.network, recipe), tmp_path / "adapter")
    arguments = {**tiny_base.architecture.arguments, "embed_dim": 32}
    other = build_network(timm_architecture("vit_tiny_patch16_224", tuple("0123456789"), 28, arguments))
    with pytest.raises(InputError, match="is damaged or belongs to another base"):
        load_adapter(other, recipe, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged or belongs to another base"):
        load_adapter(tiny_base.network, recipe, tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(InputError, match="is damaged or belongs to another base"):
        load_adapter(tiny_base.network, recipe, tmp_path / "adapter")


def test_an_adapter_of_another_mode_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    save_adapter(adapt(tiny_base.network, recipe_of("patch-embedding-head")), tmp_path / "adapter")
    with pytest.raises(InputError, match="has other parameters than the recipe trains"):
        load_adapter(tiny_base.network, recipe_of("full"), tmp_path / "adapter")


def test_merging_leaves_the_adapted_model_as_it_is(tiny_base: Base) -> None:
    model = adapt(tiny_base.network, recipe_of("lora"))
    names = set(model.state_dict())
    merged = merge(model)
    assert set(model.state_dict()) == names
    assert set(merged.state_dict()) == set(tiny_base.network.state_dict())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
