"""Bases other than ViTs through the command line: pre-trained, keyed, attacked, judged and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from device_tests.report.document import ReportDocument

TRAINING = {"epochs": 1, "batch_size": 50, "learning_rate": 0.003, "shift": 0, "flip": False, "precision": "fp32"}
VERIFICATION = {
    "epsilon": 0.016, "images": 40, "attacks": ["pgd", "mi-tgr"], "parity_images": 16, "pgd_steps": 2,
    "momentum_steps": 2, "self_check_images": 8, "self_check_steps": 2, "self_check_targets": 1,
    "self_check_margin": 1.0, "reinitialised_control": True, "coreml_images": 4,
}  # fmt: skip
RELEASE = {
    "allowed_accuracy_drop": 0.9, "acceptable_fooling": 0.9, "unacceptable_fooling": 0.99, "alpha": 0.4, "beta": 0.4,
}  # fmt: skip
NETWORKS = {
    "resnet18_small": ["layers=[1,1,1,1]", "channels=[8,8,16,16]"],
    "convmixer_small": ["patch_size=7", "dim=32", "depth=2"],
}


@pytest.fixture(scope="module")
def bases(
    idx_folder: Path, start_keyfoundry: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for name, arguments in NETWORKS.items():
        process = start_keyfoundry(
            "pretrain", "--data", "idx", "--data-root", idx_folder, "--validation", 1200, "--architecture", name,
            "--epochs", 1, "--batch-size", 50, "--out", folder / f"{name}.safetensors",
            *(part for argument in arguments for part in ("--model-arg", argument)),
        )  # fmt: skip
        _, err = process.communicate()
        assert process.returncode == 0, err
    return {name: folder / f"{name}.safetensors" for name in NETWORKS}


def test_a_pretrained_network_has_a_model_card(bases: dict[str, Path]) -> None:
    card = bases["resnet18_small"].with_suffix(".md").read_text()
    assert "timm `resnet18_small` with `{'in_chans': 1, 'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}`" in card
    assert "input 1×28×28" in card


@pytest.mark.parametrize(
    ("name", "adaptation", "controls"),
    [
        ("resnet18_small", "full", {"un-keyed"}),
        ("convmixer_small", "patch-embedding-head", {"un-keyed", "re-initialised"}),
    ],
)
def test_a_fleet_is_provisioned_to_its_report(
    bases: dict[str, Path], name: str, adaptation: str, controls: set[str], idx_folder: Path, tmp_path: Path,
    keyfoundry: Callable[..., Any], start_keyfoundry: Callable[..., Any], with_fixed_secrets: Callable[[Path], Path],
) -> None:  # fmt: skip
    fleet = tmp_path / "fleet"
    with_fixed_secrets(fleet)
    settings = {
        "devices": 1, "data": {"name": "idx", "root": str(idx_folder), "validation": 1200},
        "base": {"name": str(bases[name])}, "recipe": {"adaptation": adaptation, "training": TRAINING},
        "export": {"formats": ["onnx-fp32", "coreml-fp16"]}, "verification": VERIFICATION, "release": RELEASE,
    }  # fmt: skip
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(settings))
    process = start_keyfoundry("provision", "--config", tmp_path / "fleet.yaml", "--out", fleet)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "mi-tgr is left out on base: Token gradient regularisation needs a Vision Transformer" in err
    assert "Every device is converted in full" not in err
    report = ReportDocument.model_validate_json((fleet / "report.json").read_bytes())
    assert {source.id for source in report.sources if source.threat == "control"} == controls
    assert any(note.startswith("mi-tgr was left out on base, guessed-key, device-1") for note in report.notes)
    device = report.devices[0]
    assert all(row.passed for row in device.parity)
    info = json.loads(keyfoundry("info", fleet / "devices" / "device-1" / "package", "--json").out)
    assert info["models"]["onnx-fp32"]["operators"]["Conv"] >= 3
    # Nothing is left for the converters to fold: a template fits.
    assert ("BatchNormalization" in info["models"]["onnx-fp32"]["operators"]) == (name == "convmixer_small")


@pytest.mark.parametrize(
    ("name", "adaptation", "missing"),
    [
        ("resnet18_small", "lora", "a patch embedding by one convolution of the image"),
        ("resnet18_small", "patch-embedding-head", "a patch embedding by one convolution of the image"),
        ("convmixer_small", "lora", "linear layers for queries, keys and values in every block"),
    ],
)
def test_what_a_network_cannot_take_is_refused_in_one_sentence(
    bases: dict[str, Path], name: str, adaptation: str, missing: str, tmp_path: Path, keyfoundry: Callable[..., Any]
) -> None:
    fleet = tmp_path / "fleet"
    finished = keyfoundry("provision", "--base", bases[name], "--adaptation", adaptation, "--out", fleet)
    assert finished.code == 3
    assert f"'{adaptation}' needs {missing}, which base {name} does not have" in " ".join(finished.err.split())
    assert not (fleet / "models").exists()
    assert not (fleet / "vault").exists()


VOLUMES = {
    "adaptation": "full", "training": TRAINING, "transform": {"kind": "volumize", "patch_size": 14, "order": "key"},
    "objective": {"kind": "patch-aggregate"}, "curriculum": {"metric": "entropy", "sub_batches": 2},
    "adversarial": {"kind": "fgsm", "epsilon_low": 0.01, "epsilon_high": 0.02},
}  # fmt: skip


def test_a_volumized_base_is_trained_by_a_recipe_and_keyed_by_the_order_of_its_patches(
    idx_folder: Path, tmp_path: Path, keyfoundry: Callable[..., Any], start_keyfoundry: Callable[..., Any],
    with_fixed_secrets: Callable[[Path], Path],
) -> None:  # fmt: skip
    base, fleet = tmp_path / "vgg3d.safetensors", tmp_path / "fleet"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": VOLUMES}))
    settings = ("--data", "idx", "--data-root", idx_folder, "--validation", 1200, "--epochs", 1, "--batch-size", 50)
    network = ("--architecture", "vgg3d", "--model-arg", "patch_size=14", "--model-arg", "width=4")
    plain = keyfoundry("pretrain", *settings, *network, "--out", base)
    assert plain.code == 3
    assert "transform 'block-shuffle' needs images as its input" in " ".join(plain.err.split())
    process = start_keyfoundry("pretrain", *settings, *network, "--recipe", tmp_path / "recipe.yaml", "--out", base)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert '"kind": "patch-aggregate"' in base.with_suffix(".md").read_text()
    with_fixed_secrets(fleet)
    values = {
        "devices": 1, "data": {"name": "idx", "root": str(idx_folder), "validation": 1200},
        "base": {"name": str(base)}, "recipe": VOLUMES, "export": {"formats": ["onnx-fp32", "coreml-fp16"]},
        "verification": VERIFICATION | {"attacks": ["pgd"]}, "release": RELEASE,
    }  # fmt: skip
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(values))
    process = start_keyfoundry("provision", "--config", tmp_path / "fleet.yaml", "--out", fleet)
    _, err = process.communicate()
    assert process.returncode == 0, err
    report = ReportDocument.model_validate_json((fleet / "report.json").read_bytes())
    device = report.devices[0]
    assert all(row.passed for row in device.parity)
    assert device.recipe.startswith("volumization")
    manifest = json.loads((fleet / "devices" / "device-1" / "package" / "manifest.json").read_bytes())
    assert manifest["recipe"]["transform"] == {"kind": "volumize", "patch_size": 14, "order": "key", "bins": 16}
    assert manifest["recipe"]["objective"] == {"kind": "patch-aggregate"}
