"""Lays out text for a terminal or a log with rich: no boxes, and no markup is read.

In: texts and tables of rich. Out: text, with escape codes if it is colored. Only commands that print a table import it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from merge_gate.report.wording.untrusted import inert

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

_LEAST_WIDTH = 24


def laid_out(parts: Iterable[RenderableType], width: int, *, color: bool = False) -> str:
    """The parts below each other, at most `width` columns wide. No line is a workflow command."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=max(width, _LEAST_WIDTH),
        height=25,  # else rich ignores the width if TERM is dumb
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(Group(*parts), crop=False)
    return "".join(f"{inert(line.rstrip())}\n" for line in stream.getvalue().splitlines())


def labeled(rows: Iterable[tuple[str, Text | str]], width: int | None = None) -> Table:
    """Texts to the right of their labels. `width`: the columns of the labels, by default those of the longest."""
    table = Table.grid()
    table.add_column(width=width, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), text if isinstance(text, Text) else Text(text))
    return table
