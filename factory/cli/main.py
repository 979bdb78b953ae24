"""The ``keyfoundry`` command: collects the commands, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from factory.cli.device import device_app
from factory.cli.diff import diff_command
from factory.cli.info import info_command
from factory.cli.keys import keys_app
from factory.cli.pretrain import pretrain_command
from factory.cli.provision import provision_command
from factory.cli.purify import purify_command
from factory.cli.stages import export_command, finetune_command, report_command, verify_command
from factory.cli.study import study_command
from keys.errors import KeyfoundryError

_INTERRUPTED = 130

app = typer.Typer(
    name="keyfoundry",
    help="One secret key, one Vision Transformer, one device: provision, export and verify per-device models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("provision")(provision_command)
app.command("pretrain")(pretrain_command)
app.command("finetune")(finetune_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("report")(report_command)
app.command("study")(study_command)
app.command("purify")(purify_command)
app.command("info")(info_command)
app.command("diff")(diff_command)
app.add_typer(keys_app, name="keys")
app.add_typer(device_app, name="device")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keyfoundry {importlib.metadata.version('keyfoundry')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """One secret key, one Vision Transformer, one device."""


def run() -> None:
    """Entry point: run a command; a known error is one sentence on standard error and its exit code."""
    try:
        app(prog_name="keyfoundry")
    except KeyfoundryError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"Error: this command needs the factory's libraries ({error.name} is missing); "
            "install them with: pip install 'keyfoundry[factory]'\n"
        )
        sys.exit(KeyfoundryError.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer turns Ctrl-C into this code without a word
            sys.stderr.write("Interrupted. What was finished is kept; run the same command again to go on.\n")
        raise


if __name__ == "__main__":
    run()
