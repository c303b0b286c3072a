"""Tables in plain text and in HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = Sequence[str]


def plain_table(headers: Row, rows: Sequence[Row], *, left: int = 2) -> str:
    """Columns aligned with spaces; the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Row) -> str:
        padded = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def html_table(headers: Row, rows: Sequence[Row], *, caption: str = "") -> str:
    """The same for notebooks."""

    def line(tag: str, cells: Row) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{head}{line('th', headers)}{''.join(line('td', row) for row in rows)}</table>"


def metric(count: float) -> str:
    """A number with three digits and a unit: 4.61 G, 12.3 M, 940."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            scaled = count / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{count:.0f}"


def percent(share: float) -> str:
    """A share as a percentage with a sensible number of digits: 100 %, 6.3 %, 0.12 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %" if value >= 0.95 else f"{value:.2g} %"
