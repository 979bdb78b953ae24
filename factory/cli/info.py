"""``keyfoundry info PACKAGE``: what a package says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from factory.cli.options import Json


def info_command(
    package: Annotated[Path, typer.Argument(help="The package's folder.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Verify against this key; without it nothing is verified.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show a package's manifest: device, recipe, input contract, files, evidence; verified where a key is given.

    \b
    Example: keyfoundry info fleet/devices/device-1/package --public-key fleet/signing-key.pub
    """
    from exporters.package import inspect_package, open_package
    from keys.signing import read_public_key

    if public_key is not None:
        manifest = open_package(package, read_public_key(public_key)).manifest
        state = "signature and digests verified"
    else:
        manifest, signed = inspect_package(package)
        state = ("has a signature" if signed else "unsigned (rejected, or not judged yet)") + "; nothing was verified"
    document = manifest.to_json()
    if json_output:
        typer.echo(json.dumps({"state": state, "manifest": document}, indent=2))
        return
    typer.echo(f"{package}: {state}")
    for name in ("device_id", "generation", "fleet_id", "created", "base_digest", "adapter_digest"):
        typer.echo(f"  {name:15} {document[name]}")
    contract = manifest.input
    typer.echo(
        f"  {'input':15} {contract.color} {contract.channels}x{contract.height}x{contract.width}; {contract.resize}"
    )
    typer.echo(f"  {'labels':15} {', '.join(manifest.labels[:10])}{' …' if len(manifest.labels) > 10 else ''}")
    typer.echo(f"  {'recipe':15} {json.dumps(dict(manifest.recipe), sort_keys=True)}")
    for name, entry in manifest.files.items():
        typer.echo(f"  {'file':15} {name}  {entry.size:,} bytes  {entry.sha256[:16]}…")
    evidence: dict[str, Any] = dict(manifest.evidence)
    for name in ("accuracy", "base_accuracy", "worst_case"):
        if name in evidence:
            typer.echo(f"  {name:15} {json.dumps(evidence[name])}")
    for sentence in evidence.get("decision", {}).get("conditions", []):
        typer.echo(f"  {'decision':15} {json.dumps(sentence)}")
