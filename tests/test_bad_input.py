"""Bad input through the command line: one clear sentence, the documented exit code, no traceback, nothing lost.

The full disk, the interrupted run and two runs at once have a process of their own in ``test_pipeline.py`` and
``test_fleet_folder.py``.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factory.fleet_folder import FleetFolder
from keys.errors import exit_codes
from keys.signing import SigningKey, write_public_key

Run = Callable[..., Any]


def refused(result: Any, code: int, *words: str) -> str:
    """Check one refused command; return its sentence."""
    assert result.code == code, result.err
    assert code in exit_codes()
    assert result.out == ""
    *progress, sentence = result.err.splitlines()
    assert sentence.startswith("Error: ")
    assert "Traceback" not in result.err
    assert not [line for line in progress if "Error" in line]
    for word in words:
        assert word in sentence
    return sentence


@pytest.fixture
def provision(keyfoundry: Run, tiny_settings: Path, tmp_path: Path) -> Run:
    def call(*arguments: object) -> Any:
        return keyfoundry("provision", "--config", tiny_settings, "--out", tmp_path / "fleet", *arguments)

    return call


def image_data(root: Path, images: np.ndarray, classes: tuple[str, ...], count: int = 12) -> Path:
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(images[number * count + index]).save(folder / f"{index}.png")
    return root


# The base and the recipe


def test_an_unknown_base(provision: Run) -> None:
    refused(provision("--base", "vit_tiny_patch17"), 3, "'vit_tiny_patch17'", "close to it: ", "vit_tiny_patch16_224")


def test_a_base_that_is_no_vit(provision: Run) -> None:
    refused(provision("--base", "resnet18", "--random-weights"), 3, "resnet18", "'lora' needs a patch embedding")


def test_a_pickled_base(provision: Run) -> None:
    refused(provision("--base", "base.pth"), 3, "base.pth is a pickled checkpoint", ".safetensors")


def test_a_truncated_base(provision: Run, tiny_base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(tiny_base_path.read_bytes()[:5000])
    refused(provision("--base", tmp_path / "cut.safetensors"), 3, "cut.safetensors", "damaged")


def test_a_block_size_that_does_not_divide_the_image(provision: Run) -> None:
    refused(provision("--block-size", 5), 3, "Block size 5 does not divide", "28×28", "choose one of 2, 4, 7, 14, 28")


def test_a_class_count_that_does_not_match(provision: Run, sample_images: tuple, tmp_path: Path) -> None:
    data = image_data(tmp_path / "data", sample_images[0], ("bag", "boot", "coat"))
    result = provision("--data", "", "--data-root", data, "--config", _with_validation(tmp_path, data))
    refused(result, 3, "has 10 classes, but the data set has 3")


def _with_validation(tmp_path: Path, data: Path, **values: object) -> Path:
    path = tmp_path / "few.yaml"
    path.write_text(json.dumps({"data": {"name": "", "root": str(data), "validation": 3}} | values))
    return path


def test_too_few_images_for_the_rule(provision: Run) -> None:
    refused(provision("--images", 3), 3, "The release rule needs", "but 3 will be attacked", "verification.images")


@pytest.mark.parametrize("devices", ["", "Camera", "a,a", "../up", "base", "0"])
def test_device_ids_that_cannot_be(provision: Run, devices: str) -> None:
    refused(provision("--devices", devices), 3)


def test_a_setting_that_does_not_exist(keyfoundry: Run, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text("[recipe]\nranks = 4\n")
    result = keyfoundry("provision", "--config", tmp_path / "fleet.toml", "--out", tmp_path / "fleet")
    refused(result, 3, "recipe.ranks", "4")
    assert not (tmp_path / "fleet").exists()


def test_a_fleet_file_that_cannot_be_read(keyfoundry: Run, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("devices: [1\nseed: 3\n")
    for name in ("fleet.yaml", "none.toml"):
        refused(keyfoundry("provision", "--config", tmp_path / name, "--out", tmp_path / "fleet"), 3, name)


def test_a_value_out_of_range(provision: Run) -> None:
    refused(provision("--epsilon", "1.5"), 3, "verification.epsilon", "1.5")
    refused(provision("--adaptation", "prompt"), 3, "recipe.adaptation", "prompt", "lora")


# The data


def test_a_missing_data_folder(provision: Run, tmp_path: Path) -> None:
    refused(provision("--data", "", "--data-root", tmp_path / "none"), 3, "none does not exist", "--data-root")
    refused(provision("--data-root", tmp_path), 3, "train-images-idx3-ubyte")


def test_a_data_folder_with_one_class(
    keyfoundry: Run, sample_images: tuple, tiny_base_path: Path, tmp_path: Path
) -> None:
    data = image_data(tmp_path / "data", sample_images[0], ("bag",))
    config = _with_validation(tmp_path, data, base={"name": str(tiny_base_path)})
    result = keyfoundry("provision", "--config", config, "--out", tmp_path / "fleet")
    refused(result, 3, "has one class only; a classifier needs two or more")


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "empty", "16 bits"])
def test_more_bad_images_than_one_in_a_hundred(
    keyfoundry: Run, sample_images: tuple, tiny_base_path: Path, tmp_path: Path, kind: str
) -> None:
    data = image_data(tmp_path / "data", sample_images[0], ("bag", "boot"))
    bad = data / "train" / "bag" / "0.png"
    content = bytearray(bad.read_bytes())
    if kind == "16 bits":
        stream = io.BytesIO()
        Image.fromarray(sample_images[0][0].astype(np.uint16) * 257).save(stream, "png")
        content = bytearray(stream.getvalue())
    elif kind == "corrupt":
        content[len(content) // 2] ^= 0xFF
    bad.write_bytes({"truncated": content[:60], "empty": b""}.get(kind, content))
    config = _with_validation(tmp_path, data, base={"name": str(tiny_base_path)})
    result = keyfoundry("provision", "--config", config, "--out", tmp_path / "fleet")
    refused(result, 3, "1 of 24 train images are corrupt, truncated, empty or of 16 bits a channel", "1 %")


def test_a_truncated_idx_file(provision: Run, idx_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(idx_folder, tmp_path / "data")
    path = data / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    refused(provision("--data-root", data), 3, "t10k-images-idx3-ubyte holds 391999 bytes where its header promises")


# Training


def test_a_loss_that_is_not_a_number(provision: Run, tmp_path: Path) -> None:
    result = provision("--learning-rate", "1e30")
    refused(result, 3, "The loss of device-1 became", "lower the learning rate", "1e+30")
    assert not list((tmp_path / "fleet" / "devices").iterdir())


# Secrets


def test_a_wrong_passphrase(fleet_copy: Path, keyfoundry: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("not the passphrase\n")
    wrong.chmod(0o600)
    before = FleetFolder(fleet_copy).vault.read_bytes()
    for command in (["keys", "list"], ["verify", "--quiet"], ["keys", "rotate", "device-1"]):
        result = keyfoundry(*command, "--out", fleet_copy, "--passphrase-file", wrong)
        assert "not the passphrase" not in refused(result, 4, "The passphrase does not open the vault")
    assert FleetFolder(fleet_copy).vault.read_bytes() == before


def test_a_vault_that_others_can_read(fleet_copy: Path, keyfoundry: Run) -> None:
    vault = FleetFolder(fleet_copy).vault
    vault.chmod(0o644)
    for command in (["keys", "list"], ["verify", "--quiet"]):
        refused(keyfoundry(*command, "--out", fleet_copy), 4, "Others may use", "mode 0644", f"chmod 600 {vault}")


def test_a_damaged_vault_and_a_missing_one(fleet_copy: Path, keyfoundry: Run, tmp_path: Path) -> None:
    vault = FleetFolder(fleet_copy).vault
    vault.write_bytes(vault.read_bytes()[:-10])
    refused(keyfoundry("keys", "list", "--out", fleet_copy), 4, "corrupt or truncated; restore a backup")
    refused(keyfoundry("keys", "list", "--out", tmp_path / "none"), 4, "There is no vault at", "keyfoundry keys init")


def test_a_vault_is_never_overwritten(fleet_copy: Path, keyfoundry: Run) -> None:
    before = FleetFolder(fleet_copy).vault.read_bytes()
    refused(keyfoundry("keys", "init", "--out", fleet_copy), 4, "exists; it is never overwritten")
    assert FleetFolder(fleet_copy).vault.read_bytes() == before


# Folders and packages


def test_a_folder_made_with_other_settings(fleet_copy: Path, keyfoundry: Run, tiny_settings: Path) -> None:
    before = (fleet_copy / "fleet.toml").read_bytes()
    result = keyfoundry("provision", "--config", tiny_settings, "--out", fleet_copy, "--rank", 8)
    refused(result, 3, "was made with recipe.rank = 4, now it is 8", "choose another --out")
    assert (fleet_copy / "fleet.toml").read_bytes() == before


def test_a_folder_that_another_run_holds(fleet_copy: Path, keyfoundry: Run, tiny_settings: Path) -> None:
    with FleetFolder(fleet_copy).locked():
        for command in (["provision", "--config", tiny_settings], ["verify"], ["export"], ["keys", "init"]):
            result = keyfoundry(*command, "--out", fleet_copy)
            refused(result, 7, "Another run is working in", "wait for it or choose another --out")


def test_a_package_of_another_fleet(tiny_fleet: Path, keyfoundry: Run, tmp_path: Path) -> None:
    package = tiny_fleet / "devices" / "device-1" / "package"
    write_public_key(tmp_path / "other.pub", SigningKey(bytes(32)).public_bytes)
    for command in ("info", "device validate"):
        result = keyfoundry(*command.split(), package, "--public-key", tmp_path / "other.pub")
        refused(result, 5)


def test_a_package_of_another_device_and_a_changed_one(tiny_fleet: Path, keyfoundry: Run, tmp_path: Path) -> None:
    key = tiny_fleet / "signing-key.pub"
    package = shutil.copytree(tiny_fleet / "devices" / "device-1" / "package", tmp_path / "package")
    result = keyfoundry("device", "validate", package, "--public-key", key, "--device-id", "device-2")
    refused(result, 5, "device-2")
    model = package / "model.onnx"
    data = bytearray(model.read_bytes())
    data[1000] ^= 1
    model.write_bytes(data)
    refused(keyfoundry("device", "validate", package, "--public-key", key), 5, "model.onnx")
    refused(keyfoundry("info", tmp_path), 5)


@pytest.mark.parametrize("command", [["finetune"], ["export"], ["verify"], ["report"]])
def test_a_folder_without_a_fleet(keyfoundry: Run, tmp_path: Path, command: list[str]) -> None:
    refused(keyfoundry(*command, "--out", tmp_path / "none"), 3, "keyfoundry provision")
    assert not (tmp_path / "none").exists()


def test_a_device_that_is_not_in_the_fleet(fleet_copy: Path, keyfoundry: Run) -> None:
    for command in ("finetune", "export"):
        result = keyfoundry(command, "device-9", "--quiet", "--out", fleet_copy)
        refused(result, 3, "'device-9' is not in this fleet (device-1, device-2)")
    refused(keyfoundry("keys", "rotate", "device-9", "--out", fleet_copy), 3, "'device-9' is not in the vault")


def test_a_damaged_report_and_a_damaged_registry(fleet_copy: Path, keyfoundry: Run) -> None:
    (fleet_copy / "report.json").write_text("{}")
    refused(keyfoundry("report", "--out", fleet_copy), 3, "report.json is damaged or of another version")
    (fleet_copy / "registry.sqlite").write_bytes(b"noise" * 1000)
    refused(keyfoundry("verify", "--quiet", "--out", fleet_copy), 3, "registry.sqlite is not a registry")


def test_an_output_that_is_a_file(keyfoundry: Run, tiny_settings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(keyfoundry("provision", "--config", tiny_settings, "--out", tmp_path / "file"), 8, "a file stands")
    refused(keyfoundry("pretrain", "--out", tmp_path / "base.pt"), 3, "must end in .safetensors")
    assert (tmp_path / "file").read_text() == "mine"


def test_wrong_options_are_wrong_usage(keyfoundry: Run) -> None:
    for command in (["provision", "--no-such"], ["nonsense"], ["keys", "rotate"], ["provision", "--rank", "four"]):
        result = keyfoundry(*command)
        assert result.code == 2
        assert "Traceback" not in result.err
        assert "Error" in result.err
