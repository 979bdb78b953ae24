"""The folder of one fleet: where everything lies, who may work in it, and which settings it was made with.

Released packages lie in ``devices/``; secrets in ``secrets/`` and intermediate results (adapters give devices
away) in ``work/``, both readable by their owner only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from factory.settings import FleetSettings, parse
from keys.errors import BusyError, InputError, SecretError
from keys.files import storage_errors, write_atomic
from keys.vault import Vault, create_vault, generate_passphrase_file, open_vault, read_passphrase_file

PASSPHRASE_VARIABLE = "KEYFOUNDRY_PASSPHRASE"
# What may differ between runs in one folder: everything else would make devices that cannot be compared.
# How hard the devices are attacked changes no device, and in which formats they are exported no model.
_MAY_CHANGE = ("devices", "export", "verification")


# What it was writing, or replacing.
_LEFT_BY_A_KILLED_RUN = (
    "devices/*/.package.*.part",
    "devices/*/.adapter.*.part",
    "base/.package.*.part",
    "work/templates/.*.part",
    "work/templates/*.probe",
)


class FleetFolder:
    """The paths of one fleet's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / "fleet.toml"
        self.registry = root / "registry.sqlite"
        self.public_key = root / "signing-key.pub"
        self.vault = root / "secrets" / "vault.json"
        self.passphrase = root / "secrets" / "passphrase"
        self.devices = root / "devices"
        self.work = root / "work"
        self.log = root / "work" / "keyfoundry.log"
        self.cache = root / "work" / "data"
        self.attacks = root / "work" / "attacks"

    def package(self, device_id: str) -> Path:
        """Where a device's package lies."""
        return self.devices / device_id / "package"

    def adapter_package(self, device_id: str) -> Path:
        """Where a device's LoRA-only package lies."""
        return self.devices / device_id / "adapter"

    @property
    def base_package(self) -> Path:
        """The package that LoRA-only packages are put on."""
        return self.root / "base" / "package"

    @property
    def templates(self) -> Path:
        """Where conversions lie that devices are written from."""
        return self.work / "templates"

    @property
    def shared(self) -> Path:
        """Where a recipe keeps what it makes once for all devices."""
        return self.work / "shared"

    def model(self, name: str) -> Path:
        """Where a model's adapter and training state lie."""
        return self.work / "models" / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one run; raises BusyError if another run has it."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for private in (self.work, self.vault.parent, self.devices):
                private.mkdir(exist_ok=True)
                private.chmod(0o700)  # the packages too: in clear, each one gives its device's key away
        lock = FileLock(self.work / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BusyError(f"Another run is working in {self.root}; wait for it or choose another --out.") from error
        try:
            for pattern in _LEFT_BY_A_KILLED_RUN:
                for left in self.root.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            lock.release()

    def settle(self, settings: FleetSettings) -> None:
        """Write the resolved settings, or check that they are those that the folder was made with.

        As long as no model was finished they may still change; afterwards, more devices may be asked for, and
        nothing else. Raises InputError that names the first setting that differs.
        """
        if self.settings.is_file() and any(self.work.glob("models/*/model.json")):
            stored = self.stored_settings()
            dropped = [device_id for device_id in stored.device_ids if device_id not in settings.device_ids]
            if dropped:
                # A device that is in the field stays an attacker's source for all others.
                raise InputError(
                    f"Device {dropped[0]!r} belongs to the fleet in {self.root} and cannot be left out; name all "
                    f"devices ({', '.join(stored.device_ids)}), or leave --devices out."
                )
            before = stored.model_dump(mode="json", exclude=set(_MAY_CHANGE))
            now = settings.model_dump(mode="json", exclude=set(_MAY_CHANGE))
            for name, old, new in differences(before, now):
                raise InputError(
                    f"{self.root} was made with {name} = {old!r}, now it is {new!r}; choose another --out, or go on "
                    "with the settings in its fleet.toml."
                )
        write_atomic(self.settings, to_toml(settings).encode())

    def stored_settings(self) -> FleetSettings:
        """The settings that this folder was made with; raises InputError if it is no fleet's folder."""
        if not self.settings.is_file():
            raise InputError(f"{self.root} holds no fleet (no fleet.toml); make one with 'keyfoundry provision'.")
        try:
            values = tomllib.loads(self.settings.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.settings} is damaged: {error}") from error
        return parse(FleetSettings, values, str(self.settings))

    def open_vault(self, passphrase_file: Path | None = None) -> Vault:
        """Open the fleet's vault, or create it.

        The passphrase is the given file's, else the environment variable KEYFOUNDRY_PASSPHRASE, else that of
        ``secrets/passphrase``, which is generated for a new fleet so that nothing has to be asked.
        """
        if self.public_key.exists() and not self.vault.exists():
            raise SecretError(
                f"{self.root} is a fleet, but its vault {self.vault} is missing; put it back. A new one would make "
                "another fleet."
            )
        if passphrase_file is not None:
            passphrase = read_passphrase_file(passphrase_file)
        elif PASSPHRASE_VARIABLE in os.environ:
            passphrase = os.environ[PASSPHRASE_VARIABLE]
        elif self.passphrase.exists():
            passphrase = read_passphrase_file(self.passphrase)
        elif self.vault.exists():
            raise SecretError(
                f"The vault {self.vault} needs its passphrase: give --passphrase-file or set {PASSPHRASE_VARIABLE}."
            )
        else:
            passphrase = generate_passphrase_file(self.passphrase)
        return open_vault(self.vault, passphrase) if self.vault.exists() else create_vault(self.vault, passphrase)


def to_toml(settings: FleetSettings) -> str:
    """The settings as TOML; what is None is left out.

    >>> print(to_toml(FleetSettings(devices=2)).splitlines()[0])
    devices = 2
    """
    return "\n".join(_toml_lines(settings.model_dump(mode="json"), "")) + "\n"


def _toml_lines(table: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if not isinstance(value, dict) and value is not None:
            yield f"{name} = {_toml_value(value)}"
    for name, value in table.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{name}]"
            yield from _toml_lines(value, f"{prefix}{name}.")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in escaped) + '"'
    return repr(value)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of every setting that differs."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new
