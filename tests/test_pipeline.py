"""The whole way on real images: what a fleet's folder holds, what a second run does, and what survives a fault."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_tests.report.document import ReportDocument
from device_tests.validate import ONNXRUNTIME, validate
from exporters.package import inspect_package, open_package
from factory.fleet import Findings
from factory.fleet_folder import FleetFolder, to_toml
from factory.fleet_report import recipe_in_words
from factory.pipeline import open_fleet, provision
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from factory.registry import Registry
from factory.settings import FleetSettings
from keys.errors import PackageError
from keys.signing import SigningKey, read_public_key

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ("device-1", "device-2")
COREML = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin")
PACKAGE_FILES = {
    "manifest.json", "model.onnx", "golden.npz",
    *(f"{model}/{name}" for model in ("model.mlpackage", "model-fp32.mlpackage") for name in COREML),
}  # fmt: skip


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_again(root: Path, settings: FleetSettings | None = None) -> tuple[Findings, set[str]]:
    """A run over an existing folder in this process: its findings, and the stages that it went through."""
    folder, progress = FleetFolder(root), Progress(quiet=True)
    with folder.locked():
        fleet = open_fleet(folder, settings or folder.stored_settings(), progress)
        findings = provision(fleet, "keyfoundry provision")
    return findings, {name for name in progress.seconds if not name.startswith("judge ")}


def is_released(root: Path, device: str) -> bool:
    try:
        open_package(root / "devices" / device / "package", read_public_key(root / "signing-key.pub"), device_id=device)
    except PackageError:
        return False
    return True


# What a run leaves


def test_the_folder_is_laid_out_as_tools_rely_on(tiny_fleet: Path) -> None:
    assert {path.name for path in tiny_fleet.iterdir()} == {
        "base", "fleet.toml", "registry.sqlite", "signing-key.pub", "report.html", "report.json", "figures", "devices",
        "secrets", "work",
    }  # fmt: skip
    assert {path.name for path in (tiny_fleet / "devices").iterdir()} == set(DEVICES)
    for device in DEVICES:
        assert sorted(path.name for path in (tiny_fleet / "devices" / device).iterdir()) == ["adapter", "package"]
        package = tiny_fleet / "devices" / device / "package"
        assert set(files_in(package)) == PACKAGE_FILES | {"manifest.sig"}
    assert not [path for path in tiny_fleet.rglob("*") if path.name.endswith(".part")]


def test_released_packages_verify_with_the_fleets_key_and_no_other(tiny_fleet: Path) -> None:
    key = read_public_key(tiny_fleet / "signing-key.pub")
    for device in DEVICES:
        package = tiny_fleet / "devices" / device / "package"
        opened = open_package(package, key, device_id=device)
        assert opened.manifest.device_id == device
        assert opened.manifest.generation == 1
        assert opened.manifest.evidence["decision"]["released"] is True  # type: ignore[index]
        with pytest.raises(PackageError):
            open_package(package, SigningKey(bytes(32)).public_bytes)
        other = DEVICES[1 - DEVICES.index(device)]
        with pytest.raises(PackageError):
            open_package(package, key, device_id=other)


def test_a_released_package_passes_on_the_device(tiny_fleet: Path) -> None:
    package, key = tiny_fleet / "devices" / "device-1" / "package", read_public_key(tiny_fleet / "signing-key.pub")
    receipt = validate(package, key, device_id="device-1", runtime=ONNXRUNTIME)
    assert receipt.passed, receipt.reasons


def test_devices_differ_and_the_guess_is_neither(tiny_fleet: Path) -> None:
    digests = {
        json.loads((tiny_fleet / "work" / "models" / name / "model.json").read_text())["adapter_digest"]
        for name in (*DEVICES, "guessed-key", "un-keyed")
    }
    assert len(digests) == 4
    models = {(tiny_fleet / "devices" / device / "package" / "model.onnx").read_bytes() for device in DEVICES}
    assert len(models) == 2


def test_report_registry_and_packages_say_the_same(tiny_fleet: Path) -> None:
    document = ReportDocument.model_validate_json((tiny_fleet / "report.json").read_bytes())
    registry = Registry(tiny_fleet / "registry.sqlite").devices()
    assert [row.device_id for row in registry] == [device.id for device in document.devices] == list(DEVICES)
    for row, device in zip(registry, document.devices, strict=True):
        manifest, signed = inspect_package(tiny_fleet / row.package)
        assert signed == device.decision.released == (row.status == "released")
        assert device.package == row.package == f"devices/{device.id}/package"
        assert manifest.fleet_id == document.fleet_id == row.fleet_id
        assert manifest.adapter_digest == row.adapter_digest
        assert manifest.evidence["accuracy"] == device.clean.to_json()
    assert document.settings["devices"] == 2
    assert document.settings["verification"]["epsilon"] == 0.016
    html = (tiny_fleet / "report.html").read_text()
    assert document.fleet_id in html
    assert all(device in html for device in DEVICES)


def test_every_threat_and_the_control_are_in_the_report(tiny_fleet: Path) -> None:
    document = json.loads((tiny_fleet / "report.json").read_text())
    sources = {source["id"] for source in document["sources"]}
    assert sources == {"base", "guessed-key", *DEVICES, "un-keyed"}
    assert all(len(source["self_checks"]) == 2 for source in document["sources"])
    for target in document["targets"]:
        assert {cell["source"] for cell in target["cells"]} == sources


def test_the_table_and_the_progress_are_printed(tiny_run: tuple[Path, Any]) -> None:
    folder, printed = tiny_run
    for device in DEVICES:
        assert device in printed.out
    assert "un-keyed" in printed.out
    assert "report.html" in printed.out
    assert f"secrets lie in {folder / 'secrets'}" in printed.err
    for stage in ("device-1: 1700/1700 images", "export device-1: 2/2 parts", "attack base:", "parity device-2: 3/3"):
        assert stage in printed.err
    assert " s left" in printed.err


# Secrets


def test_no_secret_leaves_its_folder(tiny_run: tuple[Path, Any]) -> None:
    root, printed = tiny_run
    folder = FleetFolder(root)
    passphrase = folder.passphrase.read_text().strip()
    vault = folder.open_vault()
    secrets = [vault._master.secret, vault.signing_key().seed, *(vault.device_key(d).secret for d in DEVICES)]
    needles = [passphrase.encode()]
    for secret in secrets:
        assert len(secret) == 32
        encoded = [base64.b64encode(secret), base64.urlsafe_b64encode(secret)]
        needles += [secret, secret.hex().encode(), secret.hex().upper().encode(), *(text[:40] for text in encoded)]
    places = {
        str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and "secrets" not in path.parts
    }
    assert any(name.endswith("keyfoundry.log") for name in places)
    places |= {"standard output": printed.out.encode(), "standard error": printed.err.encode()}
    for name, data in places.items():
        assert not any(needle in data for needle in needles), name


def test_secrets_lie_outside_devices_and_are_private(tiny_fleet: Path) -> None:
    for name in ("secrets", "work", "devices"):
        assert stat.S_IMODE((tiny_fleet / name).stat().st_mode) == 0o700
    for path in (tiny_fleet / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for device in DEVICES:
        adapter = tiny_fleet / "work" / "models" / device / "adapter"
        assert stat.S_IMODE(adapter.stat().st_mode) == 0o700
    assert not [path for path in tiny_fleet.rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".pickle", ".bin"}
                and path.name != "weight.bin"]  # fmt: skip


# Another run


def test_a_second_run_does_only_what_is_missing(fleet_copy: Path) -> None:
    before = files_in(fleet_copy / "devices")
    findings, stages = run_again(fleet_copy)
    assert stages == set()
    assert files_in(fleet_copy / "devices") == before
    assert all(verdict.decision.released for verdict in findings.verdicts)


def test_a_damaged_package_and_a_bad_signature_are_made_good(fleet_copy: Path) -> None:
    damaged, unsigned = (fleet_copy / "devices" / device / "package" for device in DEVICES)
    weights = damaged / "model-fp32.mlpackage" / COREML[2]
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (unsigned / "manifest.sig").write_bytes(bytes(64))
    before = files_in(unsigned)
    _, stages = run_again(fleet_copy)
    assert stages == {"export device-1"}
    assert weights.read_bytes() == data
    assert all(is_released(fleet_copy, device) for device in DEVICES)
    assert files_in(unsigned) | {"manifest.sig": b""} == before | {"manifest.sig": b""}


def test_a_rotated_device_and_a_new_one_are_made_and_no_other(fleet_copy: Path, keyfoundry: Callable[..., Any]) -> None:
    before = {device: files_in(fleet_copy / "devices" / device / "package") for device in DEVICES}
    rotated = keyfoundry("keys", "rotate", "device-2", "--out", fleet_copy)
    assert rotated.code == 0, rotated.err
    settings = FleetFolder(fleet_copy).stored_settings().model_copy(update={"devices": 3})
    _, stages = run_again(fleet_copy, settings)
    touched = {name.removesuffix(" (at most)").split(" ")[-1] for name in stages}
    assert touched == {"device-2", "device-3"}
    for device in touched:
        assert {device, f"export {device}", f"attack {device}", f"parity {device}"} <= stages
    after = {device: files_in(fleet_copy / "devices" / device / "package") for device in (*DEVICES, "device-3")}
    kept = PACKAGE_FILES - {"manifest.json"}
    assert all(after["device-1"][name] == before["device-1"][name] for name in kept)
    assert after["device-2"]["model.onnx"] != before["device-2"]["model.onnx"]
    generations = {device: json.loads(after[device]["manifest.json"])["generation"] for device in after}
    assert generations == {"device-1": 1, "device-2": 2, "device-3": 1}
    rows = {(row.device_id, row.generation) for row in Registry(fleet_copy / "registry.sqlite").devices()}
    assert rows == {("device-1", 1), ("device-2", 1), ("device-2", 2), ("device-3", 1)}
    assert all(is_released(fleet_copy, device) for device in after)


def test_devices_that_were_made_of_something_else_are_named(fleet_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = fleet_copy / "work" / "models" / "device-2" / "model.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"shared": "0" * 64}))
    said: list[str] = []
    folder, progress = FleetFolder(fleet_copy), Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    with folder.locked():
        open_fleet(folder, folder.stored_settings(), progress)
    (warning,) = [words for words in said if "made from another base" in words]
    assert "fleet's now: device-2. They must be remade" in warning


def test_a_report_says_all_that_a_device_was_trained_by(fleet_copy: Path) -> None:
    folder = FleetFolder(fleet_copy)
    with folder.locked():
        fleet = open_fleet(folder, folder.stored_settings(), Progress(quiet=True))
    said = [
        target.recipe
        for target in ReportDocument.model_validate_json((fleet_copy / "report.json").read_bytes()).targets
    ]
    assert [recipe_in_words(fleet, control=control) for control in (False, False, True)] == said
    parts = {
        "rank": 3, "training": {"epochs": 2}, "keys": {"count": 2}, "objective": {"kind": "distillation"},
        "adversarial": {"kind": "free"}, "decoys": {"keys": 1},
    }  # fmt: skip
    recipe = RecipeSettings.model_validate(parts)
    other = replace(fleet, settings=fleet.settings.model_copy(update={"recipe": recipe}))
    training = "LoRA r = 3, objective distillation, adversarial free, decoys, 2 epochs"
    assert recipe_in_words(other, control=False) == f"block shuffle M = 7, 2 keys (average), {training}"
    assert recipe_in_words(other, control=True) == f"no key, {training}"
    whole = RecipeSettings.model_validate({"train_patch_embedding": True, "training": {"epochs": 2}})
    other = replace(fleet, settings=fleet.settings.model_copy(update={"recipe": whole}))
    assert recipe_in_words(other, control=True) == "no key, LoRA r = 16 with a whole patch embedding, 2 epochs"


def test_quantised_formats_are_made_and_judged_by_themselves(fleet_copy: Path) -> None:
    settings = FleetFolder(fleet_copy).stored_settings()
    names = (*settings.export.formats, "onnx-int8", "onnx-int8-static", "coreml-int8")
    export = settings.export.model_copy(update={"formats": names})
    findings, stages = run_again(fleet_copy, settings.model_copy(update={"export": export}))
    assert {"export device-1", "parity device-1"} <= stages
    assert not [stage for stage in stages if stage.startswith(("device-", "attack "))]
    document = json.loads((fleet_copy / "report.json").read_text())
    titles = {"ONNX int8", "ONNX int8 static", "Core ML int8"}
    for verdict in findings.verdicts:
        manifest, _ = inspect_package(verdict.candidate.package)
        assert set(manifest.formats) == set(names)
        evidence = json.loads(json.dumps(manifest.evidence))
        assert set(evidence["quantised"]) == titles < set(evidence["parity"])
        conditions = {condition.name for condition in verdict.decision.conditions}
        for title in titles:
            assert {f"accuracy {title}", f"transfer {title}", f"parity {title}"} <= conditions
            judged = evidence["quantised"][title]
            assert judged["accuracy"]["n"] == (100 if title.startswith("Core ML") else evidence["accuracy"]["n"])
            assert len(judged["cells"]) == len(evidence["cells"])
            assert judged["worst_case"]["n"] > 0
        (target,) = [target for target in document["targets"] if target["id"] == verdict.candidate.name]
        assert {one["format"] for one in target["quantised"]} == titles
    assert "judged by themselves" in (fleet_copy / "report.html").read_text()


def test_a_rejected_device_has_no_signature_and_says_why(fleet_copy: Path) -> None:
    """The same models under a strict rule and an unbounded attack: whatever their keys are, they fail."""
    settings = FleetFolder(fleet_copy).stored_settings()
    strict = settings.model_copy(
        update={
            "verification": settings.verification.model_copy(update={"epsilon": 1.0}),
            "release": settings.release.model_copy(update={"acceptable_fooling": 0.001, "unacceptable_fooling": 0.3}),
        }
    )
    (fleet_copy / "fleet.toml").write_text(to_toml(strict))
    findings, stages = run_again(fleet_copy)
    assert not [stage for stage in stages if not stage.startswith(("attack ", "self-check "))]
    for verdict, row in zip(findings.verdicts, Registry(fleet_copy / "registry.sqlite").devices(), strict=True):
        package = fleet_copy / "devices" / verdict.candidate.name / "package"
        assert set(files_in(package)) == PACKAGE_FILES
        assert not is_released(fleet_copy, verdict.candidate.name)
        assert not (fleet_copy / "devices" / verdict.candidate.name / "adapter").exists()
        assert not verdict.decision.released
        assert row.status == "rejected"
        assert row.reasons == list(verdict.decision.reasons) != []
        assert json.loads((package / "manifest.json").read_text())["evidence"]["decision"]["released"] is False
    document = json.loads((fleet_copy / "report.json").read_text())
    devices = [target for target in document["targets"] if target["role"] == "device"]
    assert [target["package"] for target in devices] == [None, None]
    assert all(target["decision"]["reasons"] for target in devices)


def test_an_adapter_that_was_changed_stops_the_run(fleet_copy: Path, keyfoundry: Callable[..., Any]) -> None:
    adapter = fleet_copy / "work" / "models" / "device-1" / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text() + "\n")
    result = keyfoundry("verify", "--out", fleet_copy)
    assert result.code == 3
    assert "was changed after training; delete" in result.err


# Faults

# In a namespace of its own, with a file system of its own that is nearly full.
FULL_DISK = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from factory.cli.main import run

source, disk = Path(sys.argv[1]), Path(sys.argv[2])
fleet = Path(shutil.copytree(source, disk / "fleet"))
package = fleet / "devices" / "device-1" / "package"
shutil.rmtree(package)
results = []
for room in (150_000, 450_000, None):
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    if room is not None:
        with ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - room)
    sys.argv = ["keyfoundry", "export", "device-1", "--quiet", "--out", str(fleet)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as stop:
            code = stop.code
    files = sorted(str(path.relative_to(fleet)) for path in (fleet / "devices").rglob("*") if path.is_file())
    results.append({"code": code, "err": err.getvalue(), "files": files})
print(json.dumps(results))
"""


def test_a_full_disk_during_the_export_leaves_nothing_half_written(
    tiny_fleet: Path, tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    mount = 'mount -t tmpfs -o size=64m tmpfs "$0" && exec "$@"'
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or subprocess.run(
        [*unshare, "sh", "-c", mount, str(disk), "true"], check=False, capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("no file system of a given size can be mounted here, so no disk can be filled")
    command = [sys.executable, "-c", FULL_DISK, str(tiny_fleet), str(disk)]
    done = subprocess.run(
        [*unshare, "sh", "-c", mount, str(disk), *command], cwd=ROOT, env=subprocess_environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *full, free = json.loads(done.stdout.splitlines()[-1])
    kept = [name for name in files_in(tiny_fleet / "devices") if not name.startswith("device-1/package/")]
    others = {f"devices/{name}" for name in kept}
    assert others > {f"devices/device-2/package/{name}" for name in {*PACKAGE_FILES, "manifest.sig"}}
    for result in full:
        assert result["code"] == 8, result["err"]
        assert result["err"].startswith("Error: ")
        assert len(result["err"].splitlines()) == 1
        assert "free space" in result["err"]
        assert set(result["files"]) == others
    assert free["code"] == 0, free["err"]
    assert set(free["files"]) == others | {f"devices/device-1/package/{name}" for name in PACKAGE_FILES}


def test_an_interrupted_training_goes_on_where_it_was(
    tiny_settings: Path,
    tmp_path: Path,
    start_keyfoundry: Callable[..., subprocess.Popen[str]],
    keyfoundry: Callable[..., Any],
) -> None:
    root = tmp_path / "fleet"
    process = start_keyfoundry("provision", "--config", tiny_settings, "--epochs", 8, "--out", root)
    while not list(root.glob("work/models/device-1/training-*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err.endswith("Interrupted. What was finished is kept; run the same command again to go on.\n")
    assert "Traceback" not in err
    assert not list((root / "devices").iterdir())
    assert not (root / "work" / "models" / "device-1" / "adapter").exists()
    whole = shutil.copytree(root, tmp_path / "whole")
    shutil.rmtree(whole / "work" / "models" / "device-1")
    results = [keyfoundry("finetune", "device-1", "--out", folder, "--json") for folder in (root, whole)]
    assert [result.code for result in results] == [0, 0], results
    # Eight epochs, of which at least one was the interrupted run's own; and the same weights as without it.
    resumed, fresh = (json.loads(result.out)[0] for result in results)
    assert resumed["adapter_digest"] == fresh["adapter_digest"]
    assert "device-1: 13600/13600 images" in results[0].err
    record = json.loads((root / "work" / "models" / "device-1" / "model.json").read_text())
    log = (root / "work" / "keyfoundry.log").read_text()
    assert len(record["history"]) == 8
    assert log.count("device-1 epoch 1:") == 1
