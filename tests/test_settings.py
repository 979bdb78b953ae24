"""Settings: one fault, one sentence that names the setting; TOML and YAML files say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from factory.base import read_base
from factory.cli.options import merged
from factory.fleet_folder import to_toml
from factory.settings import (
    DEFAULT_PRESET,
    FleetSettings,
    parse,
    preset_settings,
    presets,
    read_fleet_file,
    read_preset,
)
from keys.errors import InputError

TOML = """\
devices = ["camera-1", "camera-2"]
seed = 7

[data]
name = "idx"
root = "somewhere"

[recipe]
rank = 8
block_size = 4

[recipe.training]
epochs = 2
"""
YAML = """\
devices: [camera-1, camera-2]
seed: 7
data: {name: idx, root: somewhere}
recipe:
  rank: 8
  block_size: 4
  training: {epochs: 2}
"""


@pytest.mark.parametrize(("name", "text"), [("fleet.toml", TOML), ("fleet.yaml", YAML), ("fleet.yml", YAML)])
def test_a_fleet_file_may_be_toml_or_yaml(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    settings = parse(FleetSettings, read_fleet_file(path), name)
    assert settings.device_ids == ("camera-1", "camera-2")
    assert (settings.seed, settings.data.root, settings.recipe.rank) == (7, Path("somewhere"), 8)
    assert (settings.recipe.block_size, settings.recipe.training.epochs) == (4, 2)


def test_every_setting_survives_the_way_through_fleet_toml() -> None:
    values = tomllib.loads(TOML)
    values["data"]["root"] = 'a "quoted" \\ folder\twith ümlaut'
    settings = parse(FleetSettings, values, "a test")
    assert parse(FleetSettings, tomllib.loads(to_toml(settings)), "fleet.toml") == settings
    assert parse(FleetSettings, tomllib.loads(to_toml(FleetSettings())), "fleet.toml") == FleetSettings()


def test_presets_are_fleet_files_and_the_default_is_the_hardened_one() -> None:
    assert presets() == ("attractors", "hardened", "plain")
    plain, hardened = (preset_settings(name) for name in ("plain", DEFAULT_PRESET))
    assert plain == FleetSettings()
    assert hardened.base.name == "hardened"
    assert read_base(hardened.base).architecture == read_base(plain.base).architecture
    added = set(hardened.recipe.model_dump()) - set(plain.recipe.model_dump())
    assert added == {"adversarial", "train_patch_embedding"}
    assert parse(FleetSettings, tomllib.loads(to_toml(hardened)), "fleet.toml") == hardened
    attractors = preset_settings("attractors")
    assert attractors.recipe.attractors is not None
    without = attractors.recipe.model_copy(update={"attractors": None})
    assert attractors.model_copy(update={"recipe": without}) == hardened
    with pytest.raises(InputError, match="no preset 'soft'; there are attractors, hardened, plain"):
        read_preset("soft")


def test_a_number_of_devices_stands_for_their_ids() -> None:
    assert FleetSettings(devices=3).device_ids == ("device-1", "device-2", "device-3")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sed": 1}, "sed: "),
        ({"recipe": {"ranks": 4}}, "recipe.ranks: "),
        ({"recipe": {"training": {"epochs": 0}}}, r"recipe.training.epochs: .*\(got 0\)"),
        ({"recipe": {"adaptation": "prompt"}}, "recipe.adaptation: .*'lora', 'full' or 'patch-embedding-head'"),
        (
            {"recipe": {"adaptation": "full", "train_patch_embedding": True}},
            "recipe: .*trains the patch",
        ),
        ({"verification": {"epsilon": "much"}}, r"verification.epsilon: .*\(got 'much'\)"),
        ({"verification": {"epsilon": float("nan")}}, "verification.epsilon: "),
        ({"release": {"acceptable_fooling": 0.5, "unacceptable_fooling": 0.4}}, "release: .*must be below"),
        ({"base": "shipped"}, "base: "),
        ({"exports": {}}, "exports: there is no such setting"),
        ({"export": {"formats": "onnx-int8"}}, "export.formats: should be a list"),
        ({"export": {"opset": 16}}, r"export.opset: must be 17 to 22 \(got 16\)"),
    ],
)
def test_a_fault_is_one_sentence_that_names_the_setting(values: dict, named: str) -> None:
    with pytest.raises(InputError, match=f"In fleet.toml, {named}"):
        parse(FleetSettings, values, "fleet.toml")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.toml", b"devices = ", "cannot be read"),
        ("a.yaml", b"devices: [1", "cannot be read"),
        ("a.toml", b"\xff\xfe", "cannot be read"),
        ("a.yaml", b"\x00", "cannot be read"),
        ("a.yaml", b"- 1\n- 2\n", "holds no table of settings"),
        ("a.yaml", b"!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_fleet_file(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_fleet_file(tmp_path / "no.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_fleet_file(tmp_path)


def test_the_command_line_wins_over_the_file_and_leaves_the_rest() -> None:
    values = {"seed": 1, "recipe": {"rank": 4, "training": {"epochs": 9}}}
    options = {"recipe.training.epochs": 2, "base.name": "b.safetensors", "seed": None}
    assert merged(values, options) == {
        "seed": 1,
        "recipe": {"rank": 4, "training": {"epochs": 2}},
        "base": {"name": "b.safetensors"},
    }
    assert values == {"seed": 1, "recipe": {"rank": 4, "training": {"epochs": 9}}}
