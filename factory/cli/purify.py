"""``keyfoundry purify``: remove adversarial noise from images before a model sees them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from factory.cli.options import Json, Quiet


def purify_command(
    images: Annotated[
        list[Path], typer.Argument(help="PNG, JPEG or .npy files of the model's size; .npy may hold many.")
    ],
    model: Annotated[Path, typer.Option(help="A package's folder, or an .onnx of images in [0, 1] to logits.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for purified images, pictures and JSON.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Verify the package against this key; without it only the model's digest is.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the prior's optimisation.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the prior's optimisation.")] = None,
    width: Annotated[int | None, typer.Option(help="Features of the prior's network.")] = None,
    every: Annotated[int | None, typer.Option(help="Keep and judge a reconstruction every so many steps.")] = None,
    recognisable: Annotated[float | None, typer.Option(help="PSNR in dB from which reconstructions count.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the prior's code and first weights.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images optimised at once.")] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Purify images with a deep image prior, without training: NAME.png, NAME.trajectory.png and NAME.json for each.

    The model is only asked. Settings are the package's own (recipe.purifier), if it has some, or the defaults; options
    win over both. An interrupted run goes on where it stopped. What it protects from, and what not, is in
    docs/purifier.md.

    \b
    Examples:
      keyfoundry purify photo.png --model fleet/devices/device-1/package --out purified
      keyfoundry purify photo.png --model package --public-key signing-key.pub --out purified
      keyfoundry purify *.png batch.npy --model model.onnx --out purified --steps 200
    """
    from factory.cli.console import print_rows
    from factory.progress import Progress
    from factory.purifier.folder import purify_into
    from factory.purifier.image_files import read_images
    from factory.purifier.purify import check_purified
    from factory.purifier.settings import PurifierSettings
    from factory.purifier.victim import load_victim

    chosen = {
        "steps": steps, "learning_rate": learning_rate, "width": width, "every": every, "recognisable": recognisable,
        "seed": seed, "batch": batch,
    }  # fmt: skip
    victim = load_victim(model, public_key)
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    settings = dataclasses.replace(victim.settings or PurifierSettings(), **given)
    records = purify_into(out, read_images(images, victim.contract), victim, settings, Progress(quiet=quiet))
    if json_output:
        typer.echo(json.dumps([record.values for record in records], indent=2))
    else:
        rows = [
            (
                record.name, record.values["given"]["name"],
                "not purified" if record.failure else record.values["purified"]["name"],
                ", ".join(f"{one['before_step']}" for one in record.values.get("boundaries", ())) or "none",
            )
            for record in records
        ]  # fmt: skip
        print_rows(
            f"purified for {victim.where} ({victim.state})", ["image", "given", "purified", "boundary after step"], rows
        )
        typer.echo(f"Pictures: {out / (records[0].name + '.trajectory.png')}")
    check_purified({record.name: record.failure for record in records if record.failure}, len(records))
