"""Arms that name a whole recipe: merged over the study's, checked at once, and measured like all others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from device_tests.report.study_document import StudyDocument, Table
from factory.progress import Progress
from factory.recipes.bit_flip import BitFlipPart
from factory.recipes.key_ensemble import KeyEnsemblePart
from factory.settings import DEFAULT_PRESET, preset_settings
from factory.studies.catalogue import run_study
from factory.studies.spec import ArmSettings, Spec, Table1Spec, read_spec
from keys.errors import InputError

RESULTS = Path(__file__).parent.parent / "docs" / "results"
# What the models of recorded studies are called: of other names, all of them would be trained again.
KNOWN = {
    "table1-fashion-mnist.toml": {
        "lora-m7": "19036a48ecd9adb6", "full-m7": "957e733767186baf", "lora-unkeyed": "f3b5f9a1e14e83b1",
        "lora-reinit": "a66aad9fb25da353",
    },
    "table1-cifar10.toml": {
        "lora-m16": "208d9ea00de09f28", "full-m16": "b2a6afee7778be7e", "lora-unkeyed": "ad46533e54aa27c1",
        "lora-reinit": "32d81393ce160563", "full-unkeyed": "a2f1906fdeaba58d", "lora-m8": "8b981ff74a92ff7d",
        "full-m8": "9ebce8e9e95ac3ad", "lora-m4": "06ac250abf868a8f", "full-m4": "5a055e6631aa56b6",
    },
}  # fmt: skip
SPEC = """\
study: table1
seed: 3
data: {{name: idx, root: {data}, validation: 300}}
base: {{name: {base}}}
rank: 2
images: 24
momentum_steps: 2
strong_images: 8
strong_steps: 2
strong_targets: 1
perturbation: linf:8/255
ensembles: [1]
screened_ensemble: 1
transfer_attacks: [pgd]
autoattack_images: 16
autoattack_targets: 1
autoattack_queries: 10
lora_training: {{epochs: 1, batch_size: 100, learning_rate: 0.01, shift: 0, flip: false, precision: fp32}}
arms:
- {{name: chosen, models: 2, recipe: {{block_size: 7, keys: {{count: 2, combine: random}}}}}}
- {{name: flipped, models: 2, recipe: {{block_size: 14, transform: {{kind: bit-flip}}}}}}
- {{name: plain, models: 2}}
"""


def digest(spec: Spec, settings: ArmSettings) -> str:
    arm = spec.arm(settings)
    text = json.dumps([arm.recipe.model_dump(mode="json"), arm.keyed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", KNOWN)
def test_the_models_of_recorded_studies_keep_their_names(name: str) -> None:
    spec = read_spec("table1", RESULTS / name)
    assert {arm.name: digest(spec, arm) for arm in spec.arms} == KNOWN[name]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("table1", "protection.toml"), ("collusion", "protection-collusion.toml"), ("table1", "protection-strong.toml"),
     ("replication", "protection-replication.toml"), ("table1", "protection-attractors.toml"),
     ("replication", "protection-attractors-replication.toml"),
     ("replication", "protection-attractors-low-frequencies.toml")],
)  # fmt: skip
def test_what_is_measured_of_a_preset_is_that_preset(kind: str, name: str) -> None:
    """The specs write its recipe out; the control differs from it by its key alone."""
    spec = read_spec(kind, RESULTS / name)
    preset = preset_settings("attractors" if "attractors" in name else DEFAULT_PRESET)
    assert spec.base == preset.base
    for arm in spec.arms:
        recipe = spec.arm(arm).recipe
        assert recipe.block_size == (7 if arm.keyed else None)
        kept = {"block_size": preset.recipe.block_size, "training": preset.recipe.training}
        assert recipe.model_copy(update=kept) == preset.recipe


def test_the_old_fields_and_a_recipe_that_says_the_same_are_one() -> None:
    spec = Table1Spec(study="table1", rank=4, arms=(ArmSettings(name="a"),))
    for old, new in (
        ({"block_size": 7}, {"block_size": 7}),
        ({"adaptation": "full"}, {"adaptation": "full"}),
        ({"reinitialise_patch_embedding": True}, {"reinitialise_patch_embedding": True}),
        ({"adaptation": "full", "block_size": 7}, {"adaptation": "full", "block_size": 7}),
    ):
        first = ArmSettings.model_validate({"name": "a", **old})
        second = ArmSettings.model_validate({"name": "a", "recipe": new})
        assert spec.arm(first) == spec.arm(second)
        assert (first.keyed, first.adapts) == (second.keyed, second.adapts)
        with pytest.raises(ValueError, match="one recipe; leave one of them out"):
            Table1Spec(study="table1", arms=(first, second.model_copy(update={"name": "b"})))


def test_a_recipe_goes_over_the_studys() -> None:
    recipe = {
        "block_size": 14, "rank": 2, "transform": {"kind": "bit-flip"}, "keys": {"count": 3},
        "training": {"epochs": 9},
    }  # fmt: skip
    arm = ArmSettings.model_validate({"name": "a", "block_size": 7, "recipe": recipe})
    spec = Table1Spec(study="table1", arms=(arm,))
    found = spec.arm(arm)
    assert found.keyed
    assert (found.recipe.block_size, found.recipe.rank, found.recipe.alpha) == (14, 2, spec.alpha)
    assert (found.recipe.transform, found.recipe.keys) == (BitFlipPart(), KeyEnsemblePart(count=3))
    assert found.recipe.training == spec.lora_training.model_copy(update={"epochs": 9})
    full = arm.model_copy(update={"recipe": recipe | {"adaptation": "full"}})
    assert spec.arm(full).recipe.training == spec.full_training.model_copy(update={"epochs": 9})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("{transform: {kind: rot13}}", "the recipe of arm a, transform: there is no such kind"),
        ("{keys: {count: 1}}", "the recipe of arm a, keys.count: Input should be greater"),
        ("{blocksize: 7}", "the recipe of arm a, blocksize: there is no such setting"),
        ("{training: {epochs: 0}}", "the recipe of arm a, training.epochs: Input should be greater"),
    ],
)
def test_a_faulty_recipe_is_one_sentence(tmp_path: Path, recipe: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"study: table1\narms: [{{name: a, recipe: {recipe}}}]\n")
    with pytest.raises(InputError, match=said):
        read_spec("table1", path)


def test_the_spec_of_every_mode_names_every_mode() -> None:
    spec = read_spec("table1", RESULTS / "table1-modes.toml")
    recipes = [spec.arm(arm).recipe for arm in spec.arms]
    assert {recipe.transform.kind for recipe in recipes} == {"block-shuffle", "bit-flip", "format-preserving"}
    assert {recipe.adaptation for recipe in recipes} == {"lora", "full", "patch-embedding-head"}
    assert {recipe.keys.combine for recipe in recipes if recipe.keys} == {"average", "random"}
    assert {recipe.block_size for recipe in recipes} == {7, None}
    keyed, controls = ({arm.adapts for arm in spec.arms if arm.keyed == with_keys} for with_keys in (True, False))
    assert keyed <= controls  # every keyed arm has its control
    # The reference row of the paper: adversarial training, in full and without a key.
    assert [recipe.adaptation for recipe in recipes if recipe.adversarial] == ["full"]


@pytest.fixture(scope="module")
def document(
    idx_folder: Path, tiny_base_path: Path, silent: Progress, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyDocument]:
    out = tmp_path_factory.mktemp("modes")
    (out / "spec.yaml").write_text(SPEC.format(data=idx_folder, base=tiny_base_path))
    spec = read_spec("table1", out / "spec.yaml")
    return out, run_study(spec, "table1", out, silent, "keyfoundry study table1")


def rows_of(document: StudyDocument, title: str) -> dict[str, dict[str, object]]:
    found = next(block for block in document.blocks if isinstance(block, Table) and block.title == title)
    return {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_table1_measures_ensembles_and_other_transforms(document: tuple[Path, StudyDocument]) -> None:
    out, study = document
    rows = rows_of(study, "Accuracy")
    assert set(rows) == {"plain (the public base)", "chosen", "flipped", "plain"}
    agreement = rows_of(study, "Keys and agreement")
    for keyed in ("chosen", "flipped"):
        assert agreement[keyed]["another key"].value < agreement[keyed]["own key"].value  # type: ignore[attr-defined]
    assert agreement["plain"]["another key"] == "no key"
    # Two models of two keys, two of one key, and two controls.
    assert len(list(out.rglob("model.json"))) == 8
    controls = {str(row["control"]) for row in rows_of(study, "Advantage of the key").values()}
    assert controls == {"plain"}
