"""``keyfoundry device``: what runs on a device, with NumPy, onnxruntime and cryptography alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from factory.cli.options import Json
from keys.errors import CheckFailed, InputError

device_app = typer.Typer(no_args_is_help=True, help="On the device: check a package and measure it where it will run.")


@device_app.callback()
def device() -> None:
    """On the device: check a package and measure it where it will run."""


@device_app.command("validate")
def validate_command(
    package: Annotated[Path, typer.Argument(help="The package's folder.")],
    public_key: Annotated[Path, typer.Option(help="The fleet's signing-key.pub, received apart from the package.")],
    device_id: Annotated[str | None, typer.Option(help="This device's id; refuse another device's package.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled images: .npz with 'images' (uint8 N,C,H,W) and 'labels'.")
    ] = None,
    minimum_accuracy: Annotated[float | None, typer.Option(help="Fail below this accuracy on --data.")] = None,
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, or coreml (macOS with the extra 'coreml').")
    ] = "onnxruntime",
    base: Annotated[Path | None, typer.Option(help="For an adapter package: the folder of its base package.")] = None,
    receipt: Annotated[
        Path | None, typer.Option(help="Where to write the receipt (JSON); default: standard output.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Check signature and digests, reproduce the golden logits, measure accuracy and latency, write a receipt.

    \b
    Example: keyfoundry device validate package --public-key signing-key.pub --device-id device-1
    """
    from device_tests.receipt import write_receipt
    from device_tests.validate import RUNTIMES, validate
    from keys.signing import read_public_key

    if runtime not in RUNTIMES:
        raise InputError(f"Unknown runtime {runtime!r}; choose {' or '.join(RUNTIMES)}.")
    result = validate(
        package, read_public_key(public_key), device_id=device_id, data=data, minimum_accuracy=minimum_accuracy,
        base=base, runtime=RUNTIMES[runtime],
    )  # fmt: skip
    if receipt is not None:
        write_receipt(receipt, result, package=package)
    if json_output or receipt is None:
        typer.echo(json.dumps(result.to_json(), indent=2))
    sys.stderr.write(f"{result.device_id}: {'valid' if result.passed else 'NOT valid'} with {result.runtime}\n")
    if not result.passed:
        raise CheckFailed(" ".join(result.reasons))


@device_app.command("assemble")
def assemble_command(
    adapter: Annotated[Path, typer.Argument(help="The adapter package's folder.")],
    base: Annotated[Path, typer.Option(help="The folder of the base package that the device holds.")],
    public_key: Annotated[Path, typer.Option(help="The fleet's signing-key.pub, received apart from the packages.")],
    out: Annotated[Path, typer.Option(help="A new folder for the device's Core ML packages.")],
    device_id: Annotated[str | None, typer.Option(help="This device's id; refuse another device's package.")] = None,
    json_output: Json = False,
) -> None:
    """Write a device's Core ML packages from base and adapter package, byte for byte as the full package has them.

    \b
    Example: keyfoundry device assemble adapter --base base --public-key signing-key.pub --out models
    """
    from exporters.adapter.pair import assemble_coreml, open_base_of
    from exporters.package import open_package
    from keys.signing import read_public_key

    key = read_public_key(public_key)
    package = open_package(adapter, key, device_id=device_id)
    if package.manifest.kind != "adapter":
        raise InputError(f"{adapter} holds a package of kind {package.manifest.kind}, which needs no assembling.")
    folders = assemble_coreml(package, open_base_of(package, base, key), out)
    received = sum(entry.size for entry in package.manifest.files.values())
    written = {str(folder): sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in folders}
    if json_output:
        typer.echo(json.dumps({"adapter_bytes": received, "written": written}, indent=2))
    else:
        for folder, size in written.items():
            typer.echo(f"{folder}: {size:,} bytes")
        sys.stderr.write(f"{package.manifest.device_id}: assembled from an adapter package of {received:,} bytes\n")
