"""Tables whose cells are shaded by a value from -1 to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_BELOW = "194 80 10"  # orange, to be told from the accent's blue by everyone


@dataclass(frozen=True)
class Cell:
    """value: from -1 to 1, for the shade; NaN for none. text: the cell's, note: small, below it."""

    value: float
    text: str
    note: str = ""


def heat_map(caption: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[Cell]]) -> str:
    """Return the HTML of a table with one row for each entry of `rows`.

    A cell is blue above 0 and orange below. corner: heading of the column of the rows' names.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    lines = "".join(
        f'<tr><th scope="row" style="text-align: left">{escape(name)}</th>{"".join(map(_html, cells))}</tr>'
        for name, cells in rows.items()
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
    return f'<figure><table class="matrix"><caption>{escape(caption)}</caption>{body}</table></figure>'


def _html(cell: Cell) -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    if math.isnan(cell.value):
        return f"<td>{escape(cell.text)}{note}</td>"
    color = "var(--accent)" if cell.value >= 0 else _BELOW
    shade = f"background: rgb({color} / {0.62 * min(abs(cell.value), 1.0):.2f})"
    return f'<td style="{shade}">{escape(cell.text)}{note}</td>'
