"""``keyfoundry study``: run a named study, or one from a spec file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from factory.cli.options import Json, Quiet


def study_command(
    name: Annotated[
        str,
        typer.Argument(
            help="table1, collusion, conformity, localized, purifier, replication, volumization or whitebox; "
            "with --spec, any."
        ),
    ],
    spec: Annotated[Path | None, typer.Option(help="A spec file (TOML or YAML) instead of the shipped one.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all studies: models and attacks are shared.")] = (
        Path("studies")
    ),
    images: Annotated[int | None, typer.Option(help="Test images that are attacked, over the spec's number.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness.")] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Run a study: train what is missing, attack, judge, and write Markdown, JSON, HTML and figures.

    An interrupted study goes on where it stopped. The shipped specs use the embedded base and sample; specs for
    whole data sets are in docs/results, all settings in docs/studies.md.

    \b
    Examples:
      keyfoundry study collusion
      keyfoundry study table1 --spec docs/results/table1-cifar10.toml --out studies/cifar10
    """
    from factory.studies.spec import read_spec

    settings = read_spec(name, spec, {"images": images, "seed": seed})
    models = ", ".join(f"{arm.models} × {arm.name}" for arm in settings.arms) or "the public base"
    if not quiet:
        typer.echo(f"Study {name} in {out}: {models}; what is there is kept.", err=True)
    # After that line, because torch takes its time to load.
    from factory.progress import Progress
    from factory.studies.catalogue import run_study

    command = shlex.join(["keyfoundry", *sys.argv[1:]])
    document = run_study(settings, name, out, Progress(quiet=quiet), command)
    if json_output:
        typer.echo(document.to_bytes().decode())
        return
    for sentence in document.conclusion:
        typer.echo(sentence)
    typer.echo(f"Study: {out / name / 'study.html'}   {out / name / 'study.md'}")
