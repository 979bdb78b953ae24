"""Adapter packages of a fleet: signed only as the factory made them, and gone when their device is not released."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from device_tests.evidence import Proportion
from device_tests.release_rule import Condition, Decision
from exporters.adapter.adapter_file import ADAPTER_NAME, read_adapter, write_adapter
from exporters.export import ExportPlan
from exporters.manifest import SIGNATURE_NAME
from exporters.package import inspect_package, open_package, write_package
from factory.adaptation import adapt
from factory.adapter_release import publish_adapters, withdraw_adapters
from factory.base import Base, build_network, timm_architecture
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.device_model import DeviceModel
from factory.fleet import Candidate, Fleet, Verdict
from factory.fleet_folder import FleetFolder
from factory.folding import bake
from factory.packaging import Identity, export_package
from factory.progress import Progress
from factory.release import release_rule
from factory.settings import ExportSettings, FleetSettings

SHAPE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)
Released = tuple[Fleet, Verdict]


@pytest.fixture
def released(tmp_path: Path, tiny_splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Released:
    """An open fleet of one device, ONNX only, whose full package is released and whose adapter is published."""
    monkeypatch.delenv("KEYFOUNDRY_PASSPHRASE", raising=False)
    folder, quiet = FleetFolder(tmp_path / "fleet"), Progress(quiet=True)
    settings = FleetSettings(devices=1, export=ExportSettings(formats=("onnx-fp32",), adapters=True))
    architecture = timm_architecture("vit_tiny_patch16_224", tiny_splits.labels, None, SHAPE)
    base = Base(architecture, build_network(architecture))
    torch.manual_seed(0)
    shuffle = BlockShuffle(np.random.default_rng(0).permutation(49), channels=1, block_size=7)
    model = ImageClassifier(adapt(base.network, settings.recipe), architecture.mean, architecture.std, shuffle).eval()
    with folder.locked():
        vault = folder.open_vault()
    fleet = Fleet(folder, settings, vault, base, tiny_splits, quiet)
    recipe = settings.recipe.model_dump(mode="json")
    identity = Identity("device-1", 1, vault.fleet_id, "b" * 64, recipe, CREATED)
    plan = ExportPlan(architecture.contract, architecture.labels, ("onnx-fp32",))
    package, baked, images = folder.package("device-1"), bake(model), tiny_splits.validation.images.numpy()
    export_package(baked, base, identity, images, package, quiet, plan)
    trained = DeviceModel("device-1", model, "b" * 64, 1, (), CREATED)
    verdict = Verdict(
        Candidate("device-1", 1, trained, baked, package), Proportion(9, 10), {}, cast(Any, None), {}, cast(Any, None),
        decided(settings, met=True),
    )  # fmt: skip
    publish_adapters(fleet, [verdict])
    assert is_signed(fleet)
    return fleet, verdict


def decided(settings: FleetSettings, *, met: bool) -> Decision:
    return Decision(release_rule(settings.release), (Condition("transfer", met, "It was measured."),), None)


def is_signed(fleet: Fleet) -> bool:
    package = fleet.folder.adapter_package("device-1")
    if package.exists():
        open_package(package, fleet.vault.signing_key().public_bytes, device_id="device-1")
    return package.exists()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_rejected_device_loses_its_adapter_whatever_the_settings_ask_for(released: Released) -> None:
    fleet, verdict = released
    export = fleet.settings.export.model_copy(update={"adapters": False})
    without = dataclasses.replace(fleet, settings=fleet.settings.model_copy(update={"export": export}))
    publish_adapters(without, [verdict])
    assert is_signed(fleet)  # still released, and still what it was made from
    rejected = dataclasses.replace(verdict, decision=decided(fleet.settings, met=False))
    publish_adapters(without, [rejected])
    assert not is_signed(fleet)


def test_an_adapter_of_an_older_package_is_withdrawn_before_anything_is_released(released: Released) -> None:
    fleet, verdict = released
    withdraw_adapters(fleet, [verdict])
    assert is_signed(fleet)
    manifest, _ = inspect_package(verdict.candidate.package)
    write_package(verdict.candidate.package, dataclasses.replace(manifest, generation=2))
    withdraw_adapters(fleet, [verdict])
    assert not is_signed(fleet)


def test_what_somebody_put_in_the_adapters_place_is_never_signed(released: Released) -> None:
    fleet, verdict = released
    package = fleet.folder.adapter_package("device-1")
    made = files_in(package)
    manifest, _ = inspect_package(package)
    tensors = read_adapter((package / ADAPTER_NAME).read_bytes())
    write_adapter(package / ADAPTER_NAME, {**tensors, "head.bias": tensors["head.bias"] + 1})
    write_package(package, manifest)  # it still says that it stands for the full package
    (package / SIGNATURE_NAME).write_bytes(bytes(64))
    publish_adapters(fleet, [verdict])
    assert files_in(package) == made


def test_a_damaged_adapter_or_base_package_is_made_anew(released: Released) -> None:
    fleet, verdict = released
    for package in (fleet.folder.adapter_package("device-1"), fleet.folder.base_package):
        made = files_in(package)
        (package / "golden.npz").write_bytes(b"damaged")
        publish_adapters(fleet, [verdict])
        assert files_in(package) == made
        (package / SIGNATURE_NAME).unlink()
        publish_adapters(fleet, [verdict])
        assert files_in(package) == made
    assert is_signed(fleet)


def test_what_a_killed_run_left_of_an_adapter_is_taken_away(tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    left = [folder.adapter_package("device-1").with_name(".adapter.old.part"), tmp_path / "base" / ".package.x.part"]
    for path in left:
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(b"{}")
    with folder.locked():
        assert not [path for path in left if path.exists()]
