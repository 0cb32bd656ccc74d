"""Tables in the terminal: ruled where a person looks, aligned plain text anywhere else. On stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> None:
    """Prints a table.

    Args:
        head: Of the columns; all empty: no head is printed.
        rows: As long as the head.
        words: Columns that are set to the left; the others are numbers.
    """
    if sys.stdout.isatty():
        table = Table(show_header=any(head), box=None, pad_edge=False)
        for column, name in enumerate(head):
            table.add_column(name, justify="left" if column in words else "right")
        for row in rows:
            table.add_row(*row)
        Console(highlight=False, markup=False).print(table)
        return
    shown = [head, *rows] if any(head) else rows
    widths = [max((len(row[column]) for row in shown), default=0) for column in range(len(head))]
    for row in shown:
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())
