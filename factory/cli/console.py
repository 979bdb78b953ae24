"""Tables on standard output: as wide as the terminal, and whole where there is none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table; in a file or a pipe nothing is cropped, however wide it gets."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not sys.stdout.isatty():
        wide = Console(width=10_000)
        console = Console(width=Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
