"""The fleet's folder: one run at a time, one set of settings, secrets apart and private."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from factory.cli.options import merged
from factory.fleet_folder import PASSPHRASE_VARIABLE, FleetFolder
from factory.settings import FleetSettings, parse
from keys.errors import BusyError, InputError, SecretError, StorageError

SETTINGS = FleetSettings.model_validate({"devices": 2, "recipe": {"rank": 4, "training": {"epochs": 5}}})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetFolder:
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    return FleetFolder(tmp_path / "fleet")


def flat(table: dict, prefix: str = "") -> dict:
    """Nested settings as dotted names, as the command line gives them."""
    result = {}
    for name, value in table.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def finish_a_model(folder: FleetFolder) -> None:
    """From the first finished model on, the settings stay."""
    folder.model("device-1").mkdir(parents=True)
    (folder.model("device-1") / "model.json").write_text("{}")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_and_work_are_their_owners_alone(folder: FleetFolder) -> None:
    with folder.locked():
        folder.open_vault()
    assert folder.vault.parent.name == "secrets"
    assert mode(folder.vault.parent) == mode(folder.work) == 0o700
    assert mode(folder.vault) == mode(folder.passphrase) == 0o600
    for secret in (folder.vault, folder.passphrase, folder.work):
        assert folder.root / "devices" not in secret.parents
        assert folder.vault.parent not in folder.package("device-1").parents


def test_a_folder_that_was_open_to_others_is_closed(folder: FleetFolder) -> None:
    folder.vault.parent.mkdir(parents=True, mode=0o755)
    folder.work.mkdir(mode=0o755)
    with folder.locked():
        assert mode(folder.vault.parent) == mode(folder.work) == 0o700


def test_the_same_settings_are_settled_twice_and_read_back(folder: FleetFolder) -> None:
    with folder.locked():
        folder.settle(SETTINGS)
        folder.settle(SETTINGS)
    assert folder.stored_settings() == SETTINGS


def test_how_hard_devices_are_attacked_may_change(folder: FleetFolder) -> None:
    with folder.locked():
        folder.settle(SETTINGS)
        finish_a_model(folder)
        harder = parse(FleetSettings, merged(SETTINGS.model_dump(), {"verification.images": 999}), "a test")
        folder.settle(harder)
        assert folder.stored_settings() == harder


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed = 0, now it is 1"),
        ({"recipe": {"rank": 8}}, "recipe.rank = 4, now it is 8"),
        ({"recipe": {"training": {"epochs": 9}}}, "recipe.training.epochs = 5, now it is 9"),
        ({"recipe": {"block_size": 4}}, "recipe.block_size = None, now it is 4"),
        ({"release": {"allowed_accuracy_drop": 0.9}}, "release.allowed_accuracy_drop = .*, now it is 0.9"),
    ],
)
def test_another_setting_is_refused_by_its_name(folder: FleetFolder, change: dict, name: str) -> None:
    with folder.locked():
        folder.settle(SETTINGS)
        finish_a_model(folder)
        before = folder.settings.read_bytes()
        with pytest.raises(InputError, match=f"was made with {name}"):
            folder.settle(parse(FleetSettings, merged(SETTINGS.model_dump(), flat(change)), "a test"))
        assert folder.settings.read_bytes() == before


def test_settings_may_change_until_a_model_is_finished(folder: FleetFolder) -> None:
    with folder.locked():
        folder.settle(SETTINGS)
        folder.settle(SETTINGS.model_copy(update={"seed": 3}))
    assert folder.stored_settings().seed == 3


def test_more_devices_may_be_asked_for_and_none_left_out(folder: FleetFolder) -> None:
    with folder.locked():
        folder.settle(SETTINGS)
        finish_a_model(folder)
        folder.settle(SETTINGS.model_copy(update={"devices": ["device-2", "device-1", "camera"]}))
        folder.settle(SETTINGS.model_copy(update={"devices": ["device-1", "device-2", "camera", "door"]}))
        with pytest.raises(InputError, match=r"'camera' belongs to the fleet in .* and cannot be left out"):
            folder.settle(SETTINGS)
    assert folder.stored_settings().device_ids == ("device-1", "device-2", "camera", "door")


def test_a_fleet_without_its_vault_is_refused(folder: FleetFolder) -> None:
    with folder.locked():
        folder.open_vault()
        folder.public_key.write_text("a fleet's key")
        folder.vault.unlink()
        with pytest.raises(SecretError, match=r"its vault .* is missing; put it back"):
            folder.open_vault()


def test_a_folder_without_a_fleet_and_a_damaged_one_are_named(folder: FleetFolder) -> None:
    with pytest.raises(InputError, match=r"holds no fleet \(no fleet.toml\)"):
        folder.stored_settings()
    folder.root.mkdir()
    folder.settings.write_text("devices = [")
    with pytest.raises(InputError, match=r"fleet.toml is damaged"):
        folder.stored_settings()
    folder.settings.write_text("devises = 3")
    with pytest.raises(InputError, match=r"In .*fleet.toml, devises: "):
        folder.stored_settings()


def test_a_second_process_is_told_that_the_folder_is_busy(
    folder: FleetFolder, start_keyfoundry: Callable[..., subprocess.Popen[str]]
) -> None:
    with folder.locked():
        folder.open_vault().add_device("device-1")
        process = start_keyfoundry("keys", "rotate", "device-1", "--out", folder.root)
        out, err = process.communicate()
        assert (process.returncode, out) == (7, "")
        assert err == f"Error: Another run is working in {folder.root}; wait for it or choose another --out.\n"
        with pytest.raises(BusyError), FleetFolder(folder.root).locked():
            pass
    process = start_keyfoundry("keys", "rotate", "device-1", "--out", folder.root)
    process.communicate()
    assert process.returncode == 0
    assert folder.open_vault().devices() == {"device-1": 2}


def test_the_lock_goes_when_its_holder_is_killed(folder: FleetFolder) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with folder.locked():
            os.write(writer, b"held")
            os.read(os.pipe()[0], 1)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(BusyError), folder.locked():
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with folder.locked():
        pass


def test_the_passphrase_comes_from_the_file_then_the_environment_then_the_folder(
    folder: FleetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "passphrase.txt"
    given.write_text("correct horse\n")
    given.chmod(0o600)
    with folder.locked():
        fleet = folder.open_vault(given)
        assert not folder.passphrase.exists()
        with pytest.raises(
            SecretError, match=f"needs its passphrase: give --passphrase-file or set {PASSPHRASE_VARIABLE}"
        ):
            folder.open_vault()
        monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
        assert folder.open_vault().fleet_id == fleet.fleet_id
        monkeypatch.setenv(PASSPHRASE_VARIABLE, "battery staple")
        with pytest.raises(SecretError, match="The passphrase does not open the vault"):
            folder.open_vault()
        assert folder.open_vault(given).fleet_id == fleet.fleet_id


def test_a_vault_or_passphrase_that_others_can_read_is_refused(folder: FleetFolder) -> None:
    with folder.locked():
        folder.open_vault()
        for path in (folder.vault, folder.passphrase):
            path.chmod(0o644)
            with pytest.raises(SecretError, match=rf"Others may use {path} \(mode 0644\); run: chmod 600"):
                folder.open_vault()
            path.chmod(0o600)
        folder.open_vault()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands"), FleetFolder(tmp_path / "file" / "fleet").locked():
        pass
    with pytest.raises(StorageError, match="a file stands"), FleetFolder(tmp_path / "file").locked():
        pass
