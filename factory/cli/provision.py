"""``keyfoundry provision``: the main job, from keys to released packages."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factory.cli.options import DEFAULT_OUT, Json, Out, PassphraseFile, Quiet, merged
from keys.errors import InputError

if TYPE_CHECKING:
    from factory.fleet import Findings, Verdict


def provision_command(
    out: Out = DEFAULT_OUT,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Fleet file (TOML or YAML).")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="An embedded fleet file: hardened (default, unless --base or --config is given), attractors or plain."
        ),
    ] = None,
    devices: Annotated[str | None, typer.Option(help="A number of devices, or their ids, separated by commas.")] = None,
    base: Annotated[str | None, typer.Option(help="hardened, shipped, a timm name, or a checkpoint's path.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Input size of a timm base.")] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Do not load a timm base's pre-trained weights.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="sample, idx, or any timm.data.create_dataset name ('' for a folder).")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    block_size: Annotated[int | None, typer.Option(help="M of the block shuffle; default: the patch, or 4.")] = None,
    adaptation: Annotated[str | None, typer.Option(help="lora, full or patch-embedding-head.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank r.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning per device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of fine-tuning.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="How hard the devices are attacked: quick (default), standard or full.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="L-infinity budget of the attacks, in [0, 1].")] = None,
    images: Annotated[int | None, typer.Option(help="Test images that are attacked.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all public randomness (keys never depend on it).")] = None,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Make, export, attack, judge and release a fleet of devices; run again, it does only what is missing.

    \b
    Examples:
      keyfoundry provision
      keyfoundry provision --preset plain --out plain
      keyfoundry provision --devices camera-1,camera-2 --out cameras
      keyfoundry provision --data '' --data-root ../shared/data/cifar10 --base cifar.safetensors --out cifar
      keyfoundry provision --config fleet.toml --json
    """
    from factory.cli.console import print_table
    from factory.fleet_folder import FleetFolder
    from factory.pipeline import open_fleet, provision
    from factory.progress import Progress
    from factory.settings import DEFAULT_PRESET, FleetSettings, parse, read_fleet_file, read_preset

    options: dict[str, Any] = {
        "devices": _devices(devices), "base.name": base, "base.image_size": image_size,
        "base.random_weights": random_weights, "data.name": data, "data.root": data_root,
        "recipe.block_size": block_size, "recipe.adaptation": adaptation, "recipe.rank": rank,
        "recipe.training.epochs": epochs, "recipe.training.learning_rate": learning_rate,
        "verification.budget": budget, "verification.epsilon": epsilon, "verification.images": images,
        "seed": seed,
    }  # fmt: skip
    folder = FleetFolder(out)
    if preset is not None and config is not None:
        raise InputError("--preset and --config are both fleet files; leave one of them out.")
    if config is not None:
        values = read_fleet_file(config)
    elif preset is None and folder.settings.is_file():
        values = folder.stored_settings().model_dump(mode="json")
    elif preset is None and base is not None:
        values = {}
    else:
        values = read_preset(preset or DEFAULT_PRESET)
    settings = parse(FleetSettings, merged(values, options), "the settings")
    progress = Progress(quiet=quiet)
    with folder.locked():
        fleet = open_fleet(folder, settings, progress, passphrase_file)
        findings = provision(fleet, shlex.join(["keyfoundry", *sys.argv[1:]]))
    if json_output:
        typer.echo((out / "report.json").read_text())
    else:
        print_table(fleet_table(findings))
        typer.echo(f"Report: {out / 'report.html'}   Public key: {folder.public_key}")


def _devices(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    return int(text) if text.isdecimal() else [part.strip() for part in text.split(",")]


def fleet_table(findings: Findings) -> Any:
    """One row per device: accuracy, parity, fooling rates per threat, decision, package."""
    from rich.table import Table

    from device_tests.threats import Threat
    from exporters.measured import NotMeasured

    counted = [threat for threat in Threat if threat.in_rule]
    table = Table(title=_title(findings), caption=_caption(findings), show_lines=True)
    for heading in ("device", "clean accuracy", "parity", *(f"{t.code} fooled" for t in counted), "worst case"):
        table.add_column(heading)
    table.add_column("decision")
    table.add_column("package", overflow="fold", min_width=24)
    for verdict in (*findings.verdicts, *findings.controls):
        control = verdict in findings.controls
        results = {result.threat: result.fooled for result in verdict.judgement.threats}
        passed = [not isinstance(parity, NotMeasured) and parity.passed for parity in verdict.parity.values()]
        decision = "released" if verdict.decision.released else "rejected"
        table.add_row(
            verdict.candidate.name + (" (control)" if control else ""),
            _figure(verdict.clean),
            f"{sum(passed)} of {len(passed)}\nformats",
            *(_figure(results[threat]) if threat in results else "–" for threat in counted),
            _figure(verdict.judgement.worst_case),
            f"would be {decision}" if control else decision,
            "–" if control else _signed(verdict),
        )
    return table


def _signed(verdict: Verdict) -> str:
    path = os.path.relpath(verdict.candidate.package)
    return path if verdict.decision.released else f"{path}\n(not signed)"


def _figure(value: Any) -> str:
    """A proportion with its interval and n, or "not measured"."""
    from exporters.measured import NotMeasured

    if isinstance(value, NotMeasured):
        return "not measured"
    low, high = value.interval
    return f"{value.value:.3f}\n{low:.3f}–{high:.3f}\nn={value.n}"


def _title(findings: Findings) -> str:
    released = sum(verdict.decision.released for verdict in findings.verdicts)
    return f"Fleet {findings.fleet.vault.fleet_id}: {released} of {len(findings.verdicts)} devices released"


def _caption(findings: Findings) -> str:
    reasons = [
        f"{verdict.candidate.name}: {reason}" for verdict in findings.verdicts for reason in verdict.decision.reasons
    ]
    return "\n".join(reasons) if reasons else "All conditions of the release rule are met for every device."
