"""Single stages of an existing fleet: ``finetune``, ``export``, ``verify``, ``report``.

``provision`` runs all of them; these let an operator run, or run again, one at a time. The settings are those
in the folder's ``fleet.toml``.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factory.cli.options import DEFAULT_OUT, Json, Out, PassphraseFile, Quiet

if TYPE_CHECKING:
    from factory.fleet import Fleet

Devices = Annotated[list[str] | None, typer.Argument(help="Device ids; default: all of the fleet.")]


@contextlib.contextmanager
def existing_fleet(
    out: Path, passphrase_file: Path | None, quiet: bool, *, verification: Mapping[str, object] | None = None,
    export: Mapping[str, object] | None = None,
) -> Iterator[Fleet]:  # fmt: skip
    """Hold and open the fleet in ``out`` with the settings it was made with.

    ``verification``, ``export``: settings to change, None for those that stay; a ``budget`` replaces all of
    ``verification`` but ε. What changes is said, and kept.
    """
    from factory.fleet_folder import FleetFolder, differences
    from factory.pipeline import open_fleet
    from factory.progress import Progress
    from factory.settings import FleetSettings, parse

    folder, progress = FleetFolder(out), Progress(quiet=quiet)
    settings = stored = folder.stored_settings()
    values = settings.model_dump(mode="json")
    given = {name: value for name, value in (verification or {}).items() if value is not None}
    if given:
        kept = settings.verification.model_dump(mode="json", include={"epsilon"} if "budget" in given else None)
        values["verification"] = kept | given
    values["export"] |= {name: value for name, value in (export or {}).items() if value is not None}
    settings = parse(FleetSettings, values, "the settings")
    for name, old, new in differences(stored.model_dump(mode="json"), settings.model_dump(mode="json")):
        progress.say(f"Changed: {name} = {new!r} (was {old!r}).")
    with folder.locked():
        yield open_fleet(folder, settings, progress, passphrase_file)


def chosen(fleet: Fleet, devices: list[str] | None) -> list[str]:
    """The devices named on the command line, all by default; raises InputError for one that is not in the fleet."""
    from keys.errors import InputError

    known = fleet.settings.device_ids
    for device_id in devices or []:
        if device_id not in known:
            raise InputError(f"Device {device_id!r} is not in this fleet ({', '.join(known)}).")
    return list(devices or known)


def finetune_command(
    devices: Devices = None,
    out: Out = DEFAULT_OUT,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Train the adapters of devices of an existing fleet; a finished one is kept.

    \b
    Example: keyfoundry finetune device-2 --out fleet
    """
    from factory.pipeline import train_device

    with existing_fleet(out, passphrase_file, quiet) as fleet:
        rows = []
        for device_id in chosen(fleet, devices):
            model, generation = train_device(fleet, device_id)
            folder = fleet.folder.model(device_id)
            rows.append(
                {
                    "device_id": device_id,
                    "generation": generation,
                    # Of an ensemble of keys each member's lies in a folder below.
                    "adapter": str(folder if fleet.settings.recipe.keys else folder / "adapter"),
                    "adapter_digest": model.adapter_digest,
                    "trainable_parameters": model.trainable_parameters,
                    "validation_accuracy": model.history[-1].validation_accuracy,
                }
            )
    _print(rows, json_output)


def export_command(
    devices: Devices = None,
    out: Out = DEFAULT_OUT,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="A format; may be given again. All: onnx-fp32 (always there), onnx-fp16, onnx-int8, onnx-int8-static, "
            "ort-fp32, coreml-fp32, coreml-fp16, coreml-int8, coreml-palettized.",
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 17 to 22.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="ONNX images at once: dynamic (any number) or static (one).")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Oldest system for Core ML: iOS16, iOS17 or iOS18.")] = None,
    adapters: Annotated[
        bool | None, typer.Option(help="Whether released devices also get LoRA-only packages, by provision and verify.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Export devices of an existing fleet as unsigned packages; what is there already is kept.

    The first device is converted, the others are written from its template. Options change the [export] settings of
    the fleet's fleet.toml (docs/exports.md), for this and later runs. A package of other formats is replaced. To judge
    and sign the packages, and for LoRA-only ones, run 'verify' afterwards.

    \b
    Examples:
      keyfoundry export device-2 --out fleet
      keyfoundry export --out fleet --format onnx-int8 --format coreml-fp16 --target iOS18
    """
    from exporters.package import inspect_package
    from factory.pipeline import make_candidate

    named = None if formats is None else list(dict.fromkeys(["onnx-fp32", *formats]))
    given = {"formats": named, "opset": opset, "batch": batch, "target": target, "adapters": adapters}
    with existing_fleet(out, passphrase_file, quiet, export=given) as fleet:
        rows = []
        for device_id in chosen(fleet, devices):
            package = make_candidate(fleet, device_id).package
            manifest, signed = inspect_package(package)
            rows.append(
                {
                    "device_id": device_id,
                    "package": str(package),
                    "formats": list(manifest.formats),
                    "bytes": sum(entry.size for entry in manifest.files.values()),
                    "signed": signed,
                }
            )
        if fleet.settings.export.adapters:
            fleet.progress.say("LoRA-only packages are made by 'verify', for the devices that it releases.")
    _print(rows, json_output)


def verify_command(
    out: Out = DEFAULT_OUT,
    budget: Annotated[
        str | None, typer.Option(help="How hard the devices are attacked: quick, standard or full; default: as before.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Test images that are attacked.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="L∞ budget of the attacks, in [0, 1].")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="A model of your own to make attacks on: package.module:factory (its code is run) or FILE.onnx; may "
            "be given again."
        ),
    ] = None,
    adversarial: Annotated[
        Path | None, typer.Option(help="Judge adversarial images made elsewhere (.npz or a folder of PNG) and stop.")
    ] = None,
    clean_images: Annotated[
        Path | None, typer.Option(help="Write the images to attack as .npz, for attacks made elsewhere, and stop.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Attack and judge every device of an existing fleet again, release or reject it, and rewrite the report.

    Attacks that were made on the same models are reused; everything is judged anew on the packages as they are.

    \b
    Examples:
      keyfoundry verify --out fleet --json
      keyfoundry verify --out fleet --budget standard --images 500
      keyfoundry verify --out fleet --clean-images clean.npz
      keyfoundry verify --out fleet --adversarial attacked.npz
    """
    from factory.cli.adversarial import verify_adversarial, write_clean_images
    from factory.cli.console import print_table
    from factory.cli.provision import fleet_table
    from factory.pipeline import provision

    if adversarial is not None and (budget, images, epsilon) != (None, None, None):
        raise typer.BadParameter("goes without --budget, --images and --epsilon", param_hint="--adversarial")
    given = {"budget": budget, "images": images, "epsilon": epsilon}
    with existing_fleet(out, passphrase_file, quiet, verification=given) as fleet:
        if clean_images is not None:
            write_clean_images(fleet, clean_images)
            typer.echo(f"{clean_images}: the images that this fleet's attacks use.")
        if adversarial is not None:
            verify_adversarial(fleet, adversarial, json_output=json_output)
        if clean_images is not None or adversarial is not None:
            return
        findings = provision(fleet, shlex.join(["keyfoundry", *sys.argv[1:]]), source or ())
    if json_output:
        typer.echo((out / "report.json").read_text())
    else:
        print_table(fleet_table(findings))


def report_command(out: Out = DEFAULT_OUT, json_output: Json = False) -> None:
    """Say where a fleet's report is, and each device's decision; --json prints the whole report.

    \b
    Example: keyfoundry report --json
    """
    from device_tests.report.document import ReportDocument
    from keys.errors import InputError

    path = out / "report.json"
    try:
        document = ReportDocument.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"There is no report in {out}; make one with 'keyfoundry provision --out {out}'.") from error
    except ValueError as error:
        raise InputError(
            f"{path} is damaged or of another version; write it again with 'keyfoundry verify --out {out}'."
        ) from error
    if json_output:
        typer.echo(document.to_bytes().decode())
        return
    typer.echo(f"{out / 'report.html'} (fleet {document.fleet_id}, {document.created:%Y-%m-%d %H:%M} UTC)")
    for device in document.devices:
        decision = "released" if device.decision.released else "rejected"
        typer.echo(f"  {device.id}: {decision} {' '.join(device.decision.reasons)}".rstrip())


def _print(rows: list[dict[str, object]], json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo("  ".join(f"{name} {value}" for name, value in row.items()))
