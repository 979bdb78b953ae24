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
        runtime=RUNTIMES[runtime],
    )  # fmt: skip
    if receipt is not None:
        write_receipt(receipt, result, package=package)
    if json_output or receipt is None:
        typer.echo(json.dumps(result.to_json(), indent=2))
    sys.stderr.write(f"{result.device_id}: {'valid' if result.passed else 'NOT valid'} with {result.runtime}\n")
    if not result.passed:
        raise CheckFailed(" ".join(result.reasons))
