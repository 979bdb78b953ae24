"""Options that several commands share, and how they become settings: fleet file first, command line over it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the fleet.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File (mode 0600) with the vault's passphrase; else KEYFOUNDRY_PASSPHRASE, else the one that was "
        "generated into OUT/secrets."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]

DEFAULT_OUT = Path("fleet")


def merged(file_values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Put options given on the command line (dotted names, None if not given) over a fleet file's values.

    >>> merged({"seed": 1, "recipe": {"rank": 4}}, {"recipe.rank": 8, "seed": None})
    {'seed': 1, 'recipe': {'rank': 8}}
    """
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in file_values.items()}
    for dotted, value in options.items():
        if value is None:
            continue
        *path, name = dotted.split(".")
        table = values
        for part in path:
            below = table.get(part)
            table[part] = dict(below) if isinstance(below, dict) else {}
            table = table[part]
        table[name] = value
    return values
