"""Tables on standard output: as wide as the terminal, and whole where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
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


def visible(text: str) -> str:
    r"""A text from a file that anyone may have written, with nothing in it that a terminal obeys.

    >>> print(visible("\x1b[31mboot"))
    \x1b[31mboot
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print plain texts as a table; what looks like markup in them is printed as it is, control characters escaped."""
    from rich.markup import escape as escape_markup
    from rich.table import Table

    def escape(text: str) -> str:
        return escape_markup(visible(text))

    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(table)
