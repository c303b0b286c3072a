"""Canvas: figures without a display or global state, and the tile that shows one query's tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit.analysis.palette import INK, MUTED, PAPER, UNSEEN, channels
from attnkit.errors import ConfigError, load_extra, shown

# Inches: between tiles, and of one letter of a title.
GAP = 0.14
LETTER = 0.0845

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, eq=False)
class Tile:
    """What one query sees.

    Attributes:
        shares: strength of every image token, 0..1: (H, W).
        prefix: the same for the prefix tokens: (prefix,).
        spot: row and column of the query, or None.
        cells: number of the key each token belongs to (H, W), where keys stand for several tokens.
    """

    shares: Tensor
    prefix: Tensor
    spot: tuple[int, int] | None = None
    cells: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PictureRow:
    """One row of tiles.

    Attributes:
        title: bold text above the row.
        note: muted text behind it.
        colour: colour of what is seen.
        tiles: one per query.
        mask: bool (Nq, N), row per query, for the picture of the whole mask.
    """

    title: str
    note: str
    colour: str
    tiles: tuple[Tile, ...]
    mask: Tensor | None = None


def new_figure(width: float, height: float) -> Any:
    """A white figure of a size in inches.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    load_extra("matplotlib", extra="train", purpose="drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def picture_file(path: str | Path | None) -> Path | None:
    """Where a picture is to be written, looked at before it is drawn.

    Raises:
        ConfigError: for something else than a path, or another ending than those of `FORMATS`.
    """
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"pictures are written to a path such as 'window.png', but got {shown(path)}")
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise ConfigError(f"pictures are written as {', '.join(FORMATS)}, but got path {str(file)!r}")
    return file


def save(figure: Any, file: Path | None) -> None:
    """Writes a figure as PNG, SVG or PDF, by the name's ending; None writes nothing."""
    if file is None:
        return
    try:
        figure.savefig(file, dpi=160, facecolor=PAPER)
    except OSError as error:
        raise ConfigError(f"cannot write the picture {str(file)!r}: {error.strerror or error}") from error


def blend(shares: Tensor, colour: str, ground: str = UNSEEN) -> Tensor:
    """Colours between `ground` (0) and `colour` (1): (H, W) -> (H, W, 3)."""
    low, high = torch.tensor(channels(ground)), torch.tensor(channels(colour))
    return low + shares.float().clamp(0, 1)[..., None] * (high - low)


def draw_tile(axes: Any, tile: Tile, colour: str, *, image: Tensor | None = None, gap: float | None = None) -> None:
    """Draws a tile: tokens as squares, the query as a dot, prefix tokens in a row above.

    Args:
        axes: matplotlib axes of any size; one token becomes one unit.
        tile: what to draw.
        colour: colour of a token that is fully seen.
        image: colours of the tokens (H, W, 3) instead of the tile's.
        gap: width of the lines between tokens in points; by the number of tokens where not given.
    """
    height, width = tile.shares.shape
    prefix = len(tile.prefix)
    colours = blend(tile.shares, colour) if image is None else image
    axes.imshow(colours.numpy(), extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
    gap = min(1.6, 36 / max(height, width)) if gap is None else gap
    # Tokens that share a key lose the lines between them.
    cells = torch.arange(height * width).view(height, width) if tile.cells is None else tile.cells
    _lines(axes, _borders(cells), PAPER, gap if tile.cells is None else 2 * gap)
    if prefix:
        strip = blend(tile.prefix[None], colour)
        axes.imshow(strip.numpy(), extent=(0, prefix, -0.5, -1.5), interpolation="nearest", aspect="equal")
        _lines(axes, [[(x, -1.5), (x, -0.5)] for x in range(prefix + 1)], PAPER, gap)
    if tile.spot is not None:
        _mark(axes, tile.spot, tuple(colours[tile.spot].tolist()))
    axes.set_xlim(-0.05, max(width, prefix) + 0.05)
    axes.set_ylim(height + 0.05, -1.6 if prefix else -0.05)
    axes.set_axis_off()


def draw_rows(rows: Sequence[PictureRow], sizes: tuple[int, int], first: Tensor | None = None) -> Any:
    """A figure with one row of tiles per group under its title; the tiles of a sequence lie under each other.

    Args:
        rows: what to draw, at least one row.
        sizes: height and width of the grid in tokens.
        first: colours (H, W, 3) of a tile shown before the others, or None.
    """
    height, width = sizes
    prefix = any(len(tile.prefix) for row in rows for tile in row.tiles)
    flat = height == 1
    side = 7.0 if flat else 1.75
    tall = min(max(side * (height + 1.6 * prefix) / width, 0.2), 6.0)
    tiles = len(rows[0].tiles) + (first is not None)
    across, down = (1, tiles) if flat else (tiles, 1)
    extra = any(row.mask is not None for row in rows)
    square = max(tall * down + GAP * (down - 1), 0.9) if flat else side
    row_height = (square if flat and extra else tall * down + GAP * (down - 1)) + 0.55
    content = (side + GAP) * across + (square + GAP) * extra + 0.1
    written = max(0.12 + LETTER * len(row.title) + 0.07 * len(row.note) + 0.3 for row in rows)
    total = (max(content, written), row_height * len(rows) + 0.1)
    figure = new_figure(*total)

    def add_axes(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes(((left / total[0]), 1 - (top + high) / total[1], wide / total[0], high / total[1]))

    for at, row in enumerate(rows):
        top = at * row_height + 0.36
        line = {"y": 1 - (top - 0.1) / total[1], "va": "baseline"}
        figure.text(0.12 / total[0], s=row.title, fontsize=10, family="monospace", color=INK, **line)
        figure.text((0.3 + LETTER * len(row.title)) / total[0], s=row.note, fontsize=9, color=MUTED, **line)
        shown = ([None] if first is not None else []) + list(row.tiles)
        for number, tile in enumerate(shown):
            column, line_at = (0, number) if flat else (number, 0)
            axes = add_axes(0.1 + column * (side + GAP), top + line_at * (tall + GAP), side, tall)
            if tile is None:
                draw_tile(axes, Tile(torch.zeros(sizes), torch.zeros(0)), INK, image=first)
            else:
                draw_tile(axes, tile, row.colour)
        if row.mask is not None:
            axes = add_axes(0.1 + across * (side + GAP), top, square, square if flat else tall)
            axes.imshow(blend(row.mask, row.colour).numpy(), interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    return figure


def label(axes: Any, text: str, *, size: float = 9, bold: bool = False, muted: bool = False, **kwargs: Any) -> None:
    """Writes a line of text above a tile."""
    axes.set_title(
        text,
        fontsize=size,
        color=MUTED if muted else INK,
        fontweight="bold" if bold else "normal",
        **{"pad": 4, "loc": "left", **kwargs},
    )


def _mark(axes: Any, spot: tuple[int, int], inner: Any) -> None:
    """A dark square around the query, its middle in the colour of the token."""
    from matplotlib.patches import Rectangle

    row, column = spot
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=INK, edgecolor=PAPER, linewidth=0.8, zorder=3))
    axes.add_patch(Rectangle((column + 0.3, row + 0.3), 0.4, 0.4, facecolor=inner, linewidth=0, zorder=4))


def _lines(axes: Any, lines: list[Any], colour: str, width: float) -> None:
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))


def _borders(cells: Tensor) -> list[Any]:
    """Line segments between neighbours that belong to different cells, and around everything."""
    height, width = cells.shape
    lines: list[Any] = [[(0, 0), (width, 0)], [(0, height), (width, height)]]
    lines += [[(0, 0), (0, height)], [(width, 0), (width, height)]]
    for row in range(height):
        for column in range(width):
            if column + 1 < width and cells[row, column] != cells[row, column + 1]:
                lines.append([(column + 1, row), (column + 1, row + 1)])
            if row + 1 < height and cells[row, column] != cells[row + 1, column]:
                lines.append([(column, row + 1), (column + 1, row + 1)])
    return lines
