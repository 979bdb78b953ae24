"""The registry: a row per device and generation; a file that is none is refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from factory.registry import DeviceRow, Registry
from keys.errors import InputError, SecretError


def row(device_id: str, generation: int, status: str = "released") -> DeviceRow:
    return DeviceRow(
        device_id=device_id, generation=generation, fleet_id="00112233445566ff", status=status, base_digest="a" * 64,
        adapter_digest="b" * 64, manifest_digest="c" * 64, package=f"devices/{device_id}/package", reasons=["because"],
    )  # fmt: skip


def test_rows_are_kept_across_openings_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    for device_id, generation in (("b", 1), ("a", 2), ("a", 1)):
        Registry(path).record(row(device_id, generation))
    rows = Registry(path).devices()
    assert [(one.device_id, one.generation) for one in rows] == [("a", 1), ("a", 2), ("b", 1)]
    assert rows[0].reasons == ["because"]


def test_a_second_record_of_a_generation_replaces_the_first(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.record(row("a", 1))
    registry.record(row("a", 1, status="rejected"))
    assert [one.status for one in registry.devices()] == ["rejected"]


def test_a_rotated_device_is_superseded_and_its_earlier_tries_are_counted(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.record(row("a", 1))
    registry.record(row("b", 1))
    registry.supersede("a")
    registry.record(row("a", 2))
    statuses = [(one.device_id, one.generation, one.status) for one in registry.devices()]
    assert statuses == [("a", 1, "superseded"), ("a", 2, "released"), ("b", 1, "released")]
    assert (registry.earlier_generations("a", 2), registry.earlier_generations("b", 1)) == (1, 0)


def test_an_older_vault_and_another_fleets_are_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.record(row("a", 2))
    registry.check_vault("00112233445566ff", {"a": 2, "b": 1})
    with pytest.raises(SecretError, match="The vault is older than generation 2 of a"):
        registry.check_vault("00112233445566ff", {"a": 1})
    with pytest.raises(SecretError, match="The vault is of fleet ffffffffffffffff"):
        registry.check_vault("f" * 16, {"a": 2})


def test_a_damaged_file_and_another_database_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="is not a registry of this program, or it is damaged"):
        Registry(tmp_path / "noise")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE devices (name TEXT)")
    connection.close()
    with pytest.raises(InputError, match=r"is not a registry of this program .*no such column"):
        Registry(tmp_path / "other")
