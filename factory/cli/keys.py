"""``keyfoundry keys``: the fleet's vault and its devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factory.cli.options import DEFAULT_OUT, Json, Out, PassphraseFile

if TYPE_CHECKING:
    from factory.fleet_folder import FleetFolder

keys_app = typer.Typer(no_args_is_help=True, help="The fleet's vault: create it, list devices, rotate a device's key.")


@keys_app.command("init")
def init_command(out: Out = DEFAULT_OUT, passphrase_file: PassphraseFile = None, json_output: Json = False) -> None:
    """Create the vault of a new fleet: a master secret and a signing key from the system's CSPRNG.

    \b
    Example: keyfoundry keys init --out fleet --passphrase-file passphrase.txt
    """
    from factory.fleet_folder import FleetFolder
    from keys.errors import SecretError
    from keys.signing import write_public_key

    folder = FleetFolder(out)
    with folder.locked():
        if folder.vault.exists():
            raise SecretError(f"The vault {folder.vault} exists; it is never overwritten.")
        vault = folder.open_vault(passphrase_file)
        write_public_key(folder.public_key, vault.signing_key().public_bytes)
    if json_output:
        typer.echo(json.dumps({"fleet_id": vault.fleet_id, "vault": str(vault.path)}))
    else:
        typer.echo(f"Fleet {vault.fleet_id}: vault {vault.path}, public key {folder.public_key}")
        if passphrase_file is None and folder.passphrase.exists():
            typer.echo(f"Its passphrase was generated into {folder.passphrase}; keep it apart from the vault.")


@keys_app.command("list")
def list_command(out: Out = DEFAULT_OUT, passphrase_file: PassphraseFile = None, json_output: Json = False) -> None:
    """List the devices in the vault with the generation of their keys; no key is shown.

    \b
    Example: keyfoundry keys list --json
    """
    vault = _open(out, passphrase_file)
    if json_output:
        typer.echo(json.dumps({"fleet_id": vault.fleet_id, "devices": vault.devices()}))
    else:
        typer.echo(f"Fleet {vault.fleet_id}")
        for device_id, generation in vault.devices().items():
            typer.echo(f"  {device_id}  generation {generation}")


@keys_app.command("rotate")
def rotate_command(
    device_id: Annotated[str, typer.Argument(help="The device whose key is replaced.")],
    out: Out = DEFAULT_OUT,
    passphrase_file: PassphraseFile = None,
    json_output: Json = False,
) -> None:
    """Move a device to its next generation: the next 'provision' makes it a new model and package.

    \b
    Example: keyfoundry keys rotate device-2
    """
    from factory.fleet_folder import FleetFolder
    from factory.registry import Registry

    folder = FleetFolder(out)
    _check_exists(folder)
    with folder.locked():
        generation = _open(out, passphrase_file).rotate(device_id)
        if folder.registry.is_file():
            Registry(folder.registry).supersede(device_id)
    if json_output:
        typer.echo(json.dumps({"device_id": device_id, "generation": generation}))
    else:
        typer.echo(f"{device_id} is at generation {generation}; run 'keyfoundry provision --out {out}' to remake it.")


def _open(out: Path, passphrase_file: Path | None):
    from factory.fleet_folder import FleetFolder

    folder = FleetFolder(out)
    _check_exists(folder)
    return folder.open_vault(passphrase_file)


def _check_exists(folder: FleetFolder) -> None:
    from keys.errors import SecretError

    if not folder.vault.exists():
        raise SecretError(f"There is no vault at {folder.vault}; create one with 'keyfoundry keys init'.")
