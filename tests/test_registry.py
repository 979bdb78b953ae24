"""The registry: a row per device and generation; a file that is none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from factory.registry import DeviceRow, Registry
from keys.errors import InputError


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


def test_a_damaged_file_and_another_database_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="is not a registry of this program, or it is damaged"):
        Registry(tmp_path / "noise")
    import sqlite3

    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE devices (name TEXT)")
    connection.close()
    with pytest.raises(InputError, match="is not a registry of this program, or it is damaged"):
        Registry(tmp_path / "other")
