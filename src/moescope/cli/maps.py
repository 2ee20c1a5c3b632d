"""A map in the terminal: one row a name, one cell an expert, the fuller the more."""

import math
from collections.abc import Mapping, Sequence

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from moescope.cli.drawing import BLOCKS, PLAIN_BLOCKS

NAME = 12
"""Columns for a row's name."""


def draw_map(rows: Mapping[str, Sequence[float]], console: Console, width: int) -> None:
    """Print rows of numbers; 0 and less is an empty cell, 1 and more a full one."""
    blocks = BLOCKS if console.encoding.lower().startswith("utf") else PLAIN_BLOCKS
    fullest = len(blocks) - 1
    columns = width - NAME - 1
    for name, numbers in rows.items():
        cells = [blocks[max(0, min(math.ceil(x * fullest), fullest))] for x in numbers]
        for start in range(0, len(cells), columns):
            line = named("" if start else name) + "".join(cells[start : start + columns])
            console.print(Text(line), width=width, no_wrap=True)


def named(name: str) -> str:
    """The name at the width that every row's name has."""
    return set_cell_size(name, NAME) + " "
